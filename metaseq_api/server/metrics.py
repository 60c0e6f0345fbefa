"""/metrics: what the engine counted, in Prometheus's text format, under vLLM's names and a prefix of our own.

Knows names and the format. Counts nothing itself: every scrape reads the engine's Stats and Health. Its registry is its
own, not the process's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from metaseq_api.core import EngineProtocol, FinishReason, Health, Histogram, Stats

PREFIX = "metaseq_api:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REASONS = (*(reason.value for reason in FinishReason), "abort")

_GAUGES: tuple[tuple[str, str, Callable[[Health], float]], ...] = (
    ("num_requests_running", "Sequences in the cache.", lambda h: h.num_running),
    ("num_requests_waiting", "Sequences that wait for a place.", lambda h: h.num_waiting),
    ("kv_cache_usage_perc", "Blocks in use, 1 meaning all.", lambda h: 1 - h.num_free_blocks / max(h.num_blocks, 1)),
    ("kv_cache_blocks", "Blocks there are.", lambda h: h.num_blocks),
    ("engine_alive", "1 while requests are answered.", lambda h: h.alive),
    ("engine_stuck", "1 while a rank or a step takes too long.", lambda h: h.stuck),
    ("running_step_seconds", "How long the running step has taken; 0 where none runs.", lambda h: h.step_age_s or 0.0),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Stats], int]], ...] = (
    ("prompt_tokens", "Tokens of prompts.", lambda s: s.prompt_tokens),
    ("generation_tokens", "Tokens sampled, an ending </s> included.", lambda s: s.generation_tokens),
    ("num_preemptions", "Sequences that gave their blocks back to wait.", lambda s: s.num_preemptions),
    ("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Of these, tokens that were found.", lambda s: s.prefix_hits),
    ("admission_rejections", "Requests refused since too many waited.", lambda s: s.rejected),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[Stats], Histogram]], ...] = (
    ("time_to_first_token_seconds", "From a sequence's arrival to its first token.", lambda s: s.first_token_s),
    ("inter_token_latency_seconds", "Between two tokens of a sequence.", lambda s: s.inter_token_s),
    ("request_time_per_output_token_seconds", "Mean of a sequence, but for its first.", lambda s: s.per_token_s),
    ("e2e_request_latency_seconds", "From a sequence's arrival to its end.", lambda s: s.end_to_end_s),
    ("request_queue_time_seconds", "From a sequence's arrival to its first step.", lambda s: s.queue_s),
    ("request_prefill_time_seconds", "From a sequence's first step to its first token.", lambda s: s.prefill_s),
    ("request_decode_time_seconds", "From a sequence's first token to its last.", lambda s: s.decode_s),
    ("request_inference_time_seconds", "From a sequence's first step to its last token.", lambda s: s.inference_s),
    ("request_prompt_tokens", "Tokens of a prompt.", lambda s: s.prompt_len),
    ("request_generation_tokens", "Tokens sampled for a sequence.", lambda s: s.generation_len),
    ("request_params_n", "Samples computed of each prompt.", lambda s: s.samples),
    ("request_params_max_tokens", "Most tokens a request asked for.", lambda s: s.max_tokens),
    ("iteration_tokens_total", "Tokens fed in a step.", lambda s: s.step_tokens),
    ("iteration_sequences", "Sequences in a step.", lambda s: s.step_sequences),
    ("iteration_seconds", "Time of a step.", lambda s: s.step_s),
)


class Metrics(Collector):
    """Of one engine."""

    def __init__(self, engine: EngineProtocol) -> None:
        self._engine = engine
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        name, stats, health = self._engine.model_name, self._engine.stats, self._engine.health()
        labels, values = ["model_name"], [name]
        for what, says, gauge_of in _GAUGES:
            gauge = GaugeMetricFamily(PREFIX + what, says, labels=labels)
            gauge.add_metric(values, float(gauge_of(health)))
            yield gauge
        yield _ranks(name, health)
        for what, says, count_of in _COUNTERS:
            counter = CounterMetricFamily(PREFIX + what, says, labels=labels)
            counter.add_metric(values, count_of(stats))
            yield counter
        success = CounterMetricFamily(
            PREFIX + "request_success", "Sequences that ended.", labels=[*labels, "finished_reason"]
        )
        for reason in REASONS:
            success.add_metric([name, reason], stats.finished[reason])
        yield success
        for what, says, histogram_of in _HISTOGRAMS:
            yield _histogram(PREFIX + what, says, name, histogram_of(stats))


def _ranks(name: str, health: Health) -> Metric:
    ages = GaugeMetricFamily(
        PREFIX + "rank_heartbeat_age_seconds", "Since a rank was last known to live.", labels=["model_name", "rank"]
    )
    for rank, age in enumerate(health.rank_age_s):
        ages.add_metric([name, str(rank)], age)
    return ages


def _histogram(what: str, says: str, name: str, of: Histogram) -> Metric:
    family = HistogramMetricFamily(what, says, labels=["model_name"])
    buckets, total = [], 0
    for bound, count in zip((*of.bounds, math.inf), of.counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == math.inf else str(float(bound)), float(total)))
    family.add_metric([name], buckets=buckets, sum_value=of.total)
    return family
