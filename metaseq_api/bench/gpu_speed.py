"""How fast one device decodes and prefills random weights: `gpu_check`'s second half.

Bytes a token are what a step must read: every weight but the two tables of which it takes rows, and the keys and values
of its context. The bandwidth they are compared with is a copy's in the same process, bytes read and written counted.

Shapes of weights are the published ones; nothing is read from a file.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from metaseq_api.bench import peer
from metaseq_api.bench.vocabulary import filled_up
from metaseq_api.core import Batch, BatchItem, ModelConfig, Request, SamplingParams
from metaseq_api.core.config import POSITION_OFFSET
from metaseq_api.engine.channel import Channel
from metaseq_api.engine.engine import Engine
from metaseq_api.engine.limits import Limits
from metaseq_api.engine.sampler import Row, Sampler
from metaseq_api.engine.worker import Worker
from metaseq_api.kernels import have_triton
from metaseq_api.kernels.reference import NormWeights
from metaseq_api.model.cache import KVCache
from metaseq_api.model.opt import OPT
from metaseq_api.model.paths import gpu_kernels, starts_early
from metaseq_api.model.weights import DeviceWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.scheduling.blocks import BlockPool
from metaseq_api.scheduling.scheduler import Scheduler
from metaseq_api.tokenizer import PAD_ID, Tokenizer

Figure = tuple[str, float, str]
"""What, how much, and of what unit."""
BLOCK = 32
MAX_BATCH_SIZE = 256


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(job: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - began


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of the best of ten copies of a large tensor."""
    num = (1 << 31) if device.type == "cuda" else (1 << 26)
    source = torch.zeros(num, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num / min(seconds(lambda: target.copy_(source), device) for _ in range(10))


def token_bytes(
    config: ModelConfig, dtype: torch.dtype, context_len: int, batch_size: int = 1, *, kept: torch.dtype | None = None
) -> int:
    """What one decode step of so many sequences reads, with weights `kept` in another dtype perhaps. Units: bytes."""
    rows_only = (config.max_positions + POSITION_OFFSET) * config.hidden_dim
    if not config.tied_output:
        rows_only += config.vocab_size * config.embed_dim
    cached = 2 * config.num_layers * config.hidden_dim * context_len * batch_size
    return (config.num_params - rows_only) * (kept or dtype).itemsize + cached * dtype.itemsize


def make_worker(config: ModelConfig, device: torch.device, dtype: torch.dtype, tokens: int, *, graphs: bool) -> Worker:
    context = ParallelContext(device=device)
    model = OPT(config, context, dtype)
    model.load(DeviceWeights(config, device, dtype))
    cache = KVCache(config, context, dtype, num_blocks=-(-tokens // BLOCK), block_size=BLOCK)
    return Worker(model, cache, graphs=graphs, max_ahead=MAX_BATCH_SIZE)


def in_turn(worker: Worker, max_batch_size: int) -> Worker:
    """The same model and cache; each step is answered before the next is started."""
    other = Worker(worker.model, worker.cache)
    other.prepare(max_batch_size)
    return other


def make_engine(worker: Worker, max_batch_tokens: int = 2048) -> Engine:
    config, cache = worker.model.config, worker.cache
    return Engine(
        worker=worker,
        channel=Channel(worker.model.context),
        scheduler=Scheduler(
            BlockPool(cache.num_blocks, cache.block_size),
            max_batch_tokens=max_batch_tokens,
            max_batch_size=MAX_BATCH_SIZE,
        ),
        tokenizer=Tokenizer.load(*filled_up(config.vocab_size), model_vocab_size=config.vocab_size),
        limits=Limits(max_seq_len=config.max_positions),
        model_name="bench",
    )


def answer(engine: Engine, prompts: list[list[int]], num: int) -> list[list[int]]:
    """Continue every prompt by `num` tokens, greedily."""
    params = SamplingParams(max_tokens=num, temperature=0, ignore_eos=True)
    tickets = [engine.submit(Request(request_id="bench", prompts=(tuple(p),), params=params)) for p in prompts]
    while not all(t.ended for t in tickets):
        engine.turn()
    return [list(t.result()[0].token_ids) for t in tickets]


def prompts(num: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[2, *torch.randint(4, 2000, (length - 1,), generator=generator).tolist()] for _ in range(num)]


def latency(config: ModelConfig, device: torch.device, dtype: torch.dtype, *, quick: bool) -> Iterator[Figure]:
    """One stream: the step alone, the whole engine, without graphs, and a prompt of 1024 tokens."""
    steps, length = (8, 64) if quick else (128, 1024)
    peak = bandwidth(device)
    yield "bandwidth of a copy", peak / 1e12, "TB/s"
    began = time.perf_counter()
    worker = make_worker(config, device, dtype, 2 * config.max_positions, graphs=True)
    synchronize(device)
    yield "making the weights", time.perf_counter() - began, "s"
    yield "preparing decode steps", seconds(lambda: worker.prepare(2), device), "s"
    context = config.max_positions // 8
    batch = _single(context, config)

    def step(by: Worker) -> float:
        with torch.inference_mode():
            runs = [seconds(lambda: [list(by.run(batch)) for _ in range(steps)], device) for _ in range(4)]
        return min(runs[1:]) / steps

    spent = step(worker)
    yield f"step of one sequence of {context} tokens, back to back", spent * 1e3, "ms"
    yield "  of the copy's bandwidth", token_bytes(config, dtype, context) / spent / peak, ""
    yield "  without a graph", step(Worker(worker.model, worker.cache, graphs=False)) * 1e3, "ms"
    if have_triton() and starts_early(device):
        early = Worker(worker.model, worker.cache, kernels=gpu_kernels(device, early=True))
        early.prepare(1)
        yield "  each kernel started before the one before has ended", step(early) * 1e3, "ms"
    engine = make_engine(worker)

    def ask(by: Engine, length: int, num: int, seed: int) -> float:
        return seconds(lambda: answer(by, prompts(1, length, seed), num), device)

    def ask_short(by: Engine) -> tuple[float, float]:
        """Seconds to the first token of a prompt of 128, and for each after it."""
        ask(by, 128, 4, 0)
        first = statistics.median(ask(by, 128, 1, seed) for seed in range(1, 4))
        return first, (ask(by, 128, steps, 9) - first) / (steps - 1)

    first, each = ask_short(engine)
    yield "engine: time per token after the first, prompt of 128", each * 1e3, "ms"
    yield "  of the copy's bandwidth", token_bytes(config, dtype, 128 + steps // 2) / each / peak, ""
    yield "  each step answered before the next", ask_short(make_engine(in_turn(worker, 2)))[1] * 1e3, "ms"
    yield "engine: first token of a prompt of 128", first * 1e3, "ms"
    long = [ask(engine, length, 1, 20 + i) for i in range(4)]
    yield f"prefill of {length} tokens", length / statistics.median(long[1:]), "tokens/s"
    yield from _waits(worker, device)


def _single(context: int, config: ModelConfig) -> Batch:
    blocks = tuple(range(-(-context // BLOCK)))
    return Batch(items=(BatchItem(start=context - 1, token_ids=(5,), block_ids=blocks, num_logits=1, num_prompt=0),))


def _waits(worker: Worker, device: torch.device) -> Iterator[Figure]:
    """How often sampling waits for the GPU; torch counts these itself."""
    if device.type != "cuda":
        return
    sampler = Sampler(num_tokens=worker.model.config.vocab_size - 8, banned=[1])
    logits = torch.randn(8, worker.model.config.vocab_size, device=device)
    for name, params in (("greedy", SamplingParams(temperature=0)), ("top_p", SamplingParams(top_p=0.9, logprobs=2))):
        rows = [Row(params=params, uniform=0.5, top_p=params.top_p)] * 8
        sampler.sample(logits, rows)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            sampler.sample(logits, rows)
        torch.cuda.set_sync_debug_mode("default")
        yield f"sampling, {name}: waits for the GPU", float(len(found)), ""


def throughput(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, num: int, prompt_len: int, new: int
) -> Iterator[Figure]:
    """Many requests at once, through the engine."""
    worker = make_worker(config, device, dtype, num * (prompt_len + new + BLOCK), graphs=True)
    worker.prepare(num)

    def all_of(engine: Engine) -> float:
        answer(engine, prompts(num, prompt_len, 1), 4)
        return seconds(lambda: answer(engine, prompts(num, prompt_len, 3), new), device)

    engine = make_engine(worker, max_batch_tokens=8192)
    whole = all_of(engine)
    first = seconds(lambda: answer(engine, prompts(num, prompt_len, 2), 1), device)
    what = f"{num} requests of {prompt_len} + {new} tokens"
    yield what, num * new / whole, "tokens/s"
    yield "  first tokens of all", first, "s"
    yield "  a decode step", (whole - first) / (new - 1) * 1e3, "ms"
    answered_first = all_of(make_engine(in_turn(worker, num), max_batch_tokens=8192))
    yield "  each step answered before the next", num * new / answered_first, "tokens/s"


def rival(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, num: int, prompt_len: int, new: int, static: bool
) -> Iterator[Figure]:
    """The same through Hugging Face's generate: its own growing cache first, then the compiled static one."""
    model = peer.hugging_face(config, DeviceWeights(config, device, dtype), device, dtype)
    asked = prompts(num, prompt_len, 3)
    what = f"Hugging Face: {num} requests of {prompt_len} + {new} tokens"
    peer.generate(model, asked, 4)
    spent = seconds(lambda: peer.generate(model, asked, new), device)
    yield f"{what}, dynamic cache", num * new / spent, "tokens/s"
    if static:
        yield "  its compiling", seconds(lambda: peer.generate(model, asked, new, static=True), device), "s"
        spent = seconds(lambda: peer.generate(model, asked, new, static=True), device)
        yield f"{what}, static cache, compiled", num * new / spent, "tokens/s"


def tune(device: torch.device) -> Iterator[Figure]:
    """One-row products, torch's and ours by the size of a program's share: fractions of the copy's bandwidth."""
    if device.type != "cuda" or not have_triton():
        return
    from metaseq_api.kernels.row_linear import row_linear  # needs Triton

    peak = bandwidth(device)
    for outputs, inputs in ((6144, 2048), (8192, 2048), (2048, 8192), (15360, 5120), (5120, 20480), (50272, 7168)):
        copies = max(2, (1 << 29) // (outputs * inputs))  # more than the cache holds
        weights = [torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        x = torch.randn(1, inputs, device=device, dtype=torch.bfloat16)
        b = torch.randn(outputs, device=device, dtype=torch.bfloat16)

        def share(job: Callable[[torch.Tensor], object], weights: list[torch.Tensor] = weights) -> float:
            graph = torch.cuda.CUDAGraph()
            job(weights[0])
            with torch.cuda.graph(graph):
                for w in weights:
                    job(w)
            spent = min(seconds(graph.replay, device) for _ in range(5))
            return len(weights) * weights[0].numel() * 2 / spent / peak

        yield f"{outputs} x {inputs}: torch", share(lambda w, x=x, b=b: torch.nn.functional.linear(x, w, b)), ""  # type: ignore[misc]
        for shape in ((1, 1024, 4), (2, 1024, 4), (4, 512, 4), (4, 1024, 4), (4, 1024, 8), (8, 512, 4), (8, 1024, 8)):
            yield f"  ours, {shape}", share(lambda w, x=x, b=b, s=shape: row_linear(x, w, b, shape=s)), ""  # type: ignore[misc]
        norm = NormWeights(x[0], x[0], 1e-5)
        for shape in ((4, 1024, 4), (8, 1024, 8)):
            normed = share(lambda w, x=x, b=b, n=norm, s=shape: row_linear(x, w, b, norm=n, shape=s))  # type: ignore[misc]
            yield f"  ours, with a norm, {shape}", normed, ""
        if starts_early(device):
            yield "  ours, started early", share(lambda w, x=x, b=b: row_linear(x, w, b, early=True)), ""  # type: ignore[misc]


def greedy(config: ModelConfig, device: torch.device) -> tuple[int, int]:
    """Tokens that the engine and Hugging Face's generate both chose, and how many were asked for; both in fp32."""
    ours = make_engine(make_worker(config, device, torch.float32, 4096, graphs=True))
    model = peer.hugging_face(config, DeviceWeights(config, device, torch.float32), device, torch.float32)
    asked = [p for i, length in enumerate((5, 64, 31, 100, 8)) for p in prompts(1, length, 40 + i)]
    got = answer(ours, asked, 24)
    want = [peer.generate(model, [p], 24, banned=[PAD_ID])[0] for p in asked]  # which the engine never chooses
    return sum(g == w for a, b in zip(got, want, strict=True) for g, w in zip(a, b, strict=True)), 24 * len(asked)
