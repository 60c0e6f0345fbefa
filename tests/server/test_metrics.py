"""What a scrape gets, read back by prometheus_client's own parser."""

from __future__ import annotations

from flask.testing import FlaskClient
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from support.fake_engine import FakeEngine

from metaseq_api.server.metrics import PREFIX

VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits
num_preemptions prompt_tokens generation_tokens request_success time_to_first_token_seconds
inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
request_inference_time_seconds request_prompt_tokens request_generation_tokens request_params_n
request_params_max_tokens iteration_tokens_total admission_rejections
"""


def scrape(client: FlaskClient) -> dict[tuple[str, str], float]:
    """By name and the one label that is not the model's name."""
    answer = client.get("/metrics")
    assert answer.mimetype == "text/plain"
    families = list(text_string_to_metric_families(answer.text))
    assert {PREFIX + name for name in VLLM.split()} <= {f.name for f in families}
    assert all(f.documentation for f in families)
    out = {}
    for sample in (s for f in families for s in f.samples):
        labels = dict(sample.labels)
        assert labels.pop("model_name") == "fake"
        out[sample.name.removeprefix(PREFIX), ",".join(labels.values())] = sample.value
    return out


def test_vllms_names_hold_the_engines_numbers(client: FlaskClient, engine: FakeEngine) -> None:
    stats = engine.stats
    stats.ask(2, 16, [7])
    stats.arrive(1, 0.0)
    stats.step([1], 8, [1], began=0.5, now=1.0)
    stats.finish(1, "length", 2.0)
    stats.prefix_queries, stats.prefix_hits, stats.num_preemptions, stats.rejected = 64, 32, 3, 4
    got = scrape(client)
    assert got["prompt_tokens_total", ""] == 7
    assert got["generation_tokens_total", ""] == 1
    assert got["request_success_total", "length"] == 1
    assert got["request_success_total", "abort"] == 0
    assert got["prefix_cache_hits_total", ""] / got["prefix_cache_queries_total", ""] == 0.5
    assert (got["num_preemptions_total", ""], got["admission_rejections_total", ""]) == (3, 4)
    assert got["time_to_first_token_seconds_bucket", "0.5"] == 0
    assert got["time_to_first_token_seconds_bucket", "1.0"] == 1
    assert got["time_to_first_token_seconds_bucket", "+Inf"] == got["time_to_first_token_seconds_count", ""] == 1
    assert got["e2e_request_latency_seconds_sum", ""] == 2
    assert got["rank_heartbeat_age_seconds", "0"] == 0.25
    assert got["rank_heartbeat_age_seconds", "1"] == float("inf")
    assert (got["engine_alive", ""], got["engine_stuck", ""]) == (1, 0)


def test_two_apps_do_not_share_their_numbers_nor_touch_the_process_registry(client: FlaskClient) -> None:
    assert scrape(client)["prompt_tokens_total", ""] == 0
    assert not [m for m in REGISTRY.collect() if m.name.startswith(PREFIX)]
