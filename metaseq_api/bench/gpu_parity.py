"""Whether every way that a device can run a step gives Hugging Face's logits: `gpu_check`'s first half.

The same steps go through each way: whole prompts, a chunk beside sequences that decode, decoding alone. fp32 (without
TF32) must agree with Hugging Face's fp32 within ATOL; bf16 and fp16 may err at most WORSE times as much as Hugging Face
itself does in that dtype, both against its fp32 (root mean square over all logits). The likeliest token must be Hugging
Face's, unless the two are nearer to each other than what Hugging Face errs in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from metaseq_api.bench import peer
from metaseq_api.core import Batch, BatchItem, ModelConfig
from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.kernels import reference
from metaseq_api.model.cache import KVCache
from metaseq_api.model.decode_step import DecodeSteps
from metaseq_api.model.opt import OPT
from metaseq_api.model.paths import GpuKernels, gpu_kernels, plan, starts_early
from metaseq_api.model.weights import DeviceWeights
from metaseq_api.parallel.context import ParallelContext
from metaseq_api.parallel.layers import Linear

ATOL, WORSE = 1e-4, 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNEL_ATOL = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}
WIDTHS = {"fp32": (64, 80), "bf16": (64, 80, 96, 128, 256), "fp16": (64, 80)}
"""Of heads, by dtype; each is compiled."""
EARLY_WIDTHS = {"bf16": (64, 80, 128)}
BLOCK = 16
VOCAB = 4096
TINY = {
    "head width 64": ModelConfig(num_layers=2, hidden_dim=128, num_heads=2, ffn_dim=256, vocab_size=VOCAB),
    "head width 80": ModelConfig(num_layers=2, hidden_dim=320, num_heads=4, ffn_dim=640, vocab_size=VOCAB),
    "head width 128": ModelConfig(num_layers=2, hidden_dim=256, num_heads=2, ffn_dim=512, vocab_size=VOCAB),
    "350m's norms and projections": ModelConfig(
        num_layers=2,
        hidden_dim=128,
        num_heads=2,
        ffn_dim=256,
        vocab_size=VOCAB,
        embed_dim=64,
        pre_norm=False,
        final_norm=False,
    ),
    "gelu": ModelConfig(num_layers=2, hidden_dim=128, num_heads=2, ffn_dim=256, vocab_size=VOCAB, activation="gelu"),
}
Run = Callable[[Batch], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped(ParallelContext):
    """One rank that sums over a group as those of a split model do, alone in it: so the graph of such a model is
    captured, and replayed, on one GPU. NCCL has then nothing to sum, and at most copies."""

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x


def _grouped(device: torch.device) -> Grouped:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return Grouped(device=device, group=dist.group.WORLD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison. error: what is bounded; bound: by what."""

    what: str
    error: float
    bound: float
    strays: int = 0
    """Positions whose likeliest token is another one, beyond what a near tie explains."""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.strays == 0


def ways(model: OPT, cache: KVCache) -> dict[str, Run]:
    """Every way to run a step on this device, by name."""
    kernels = gpu_kernels(model.context.device)
    out = {"plain torch": _whole(model, cache, None), "paged, plain": _whole(model, cache, reference.PLAIN)}
    best = "paged, plain"
    if kernels is not None:
        best = "paged, Triton"
        out[best] = _whole(model, cache, kernels)
    uncaptured = DecodeSteps(model, cache, kernels or reference.PLAIN, capture=False)
    out["fixed buffers"] = _stepped(uncaptured, out[best])
    if kernels is not None:
        out["CUDA graph"] = _stepped(DecodeSteps(model, cache, kernels), out[best])
    return out


def _whole(model: OPT, cache: KVCache, kernels: GpuKernels | None) -> Run:
    def run(batch: Batch) -> Tensor:
        found = model.logits(model(plan(batch, cache, model.context.device, kernels), cache))
        assert found is not None
        return found

    return run


def _stepped(steps: DecodeSteps, else_: Run) -> Run:
    def run(batch: Batch) -> Tensor:
        if not steps.takes(batch):
            return else_(batch)
        found = steps.run(batch)
        assert found is not None
        return found.clone()

    return run


def early_ways(model: OPT, cache: KVCache) -> dict[str, Run]:
    """Those whose kernels may start before the one before has ended."""
    kernels = gpu_kernels(model.context.device, early=True)
    assert kernels is not None
    return {"CUDA graph, early starts": _stepped(DecodeSteps(model, cache, kernels), _whole(model, cache, kernels))}


def check_model(
    name: str,
    config: ModelConfig,
    device: torch.device,
    dtypes: list[str],
    std: float,
    context: ParallelContext | None = None,
    *,
    early: bool = False,
) -> Iterator[Check]:
    """Every way, or every one with `early` starts, and dtype of one model, against Hugging Face."""
    weights = DeviceWeights(config, device, torch.float32, std=std)
    texts = [_text(50, 1), _text(37, 2), _text(70, 3)]
    want = _theirs(config, weights, device, "fp32", texts)
    halves = {d: _theirs(config, weights, device, d, texts) for d in dtypes if d != "fp32"}
    bounds = {"fp32": ATOL} | {d: WORSE * _rms(got, want) for d, got in halves.items()}
    ties = {"fp32": 2 * ATOL} | {d: 2 * WORSE * _most(got, want) for d, got in halves.items()}
    context = context or ParallelContext(device=device)
    for dtype in dtypes:
        model = OPT(config, context, DTYPES[dtype])
        model.load(weights)
        cache = KVCache(config, context, DTYPES[dtype], num_blocks=40, block_size=BLOCK)
        for way, run in (early_ways if early else ways)(model, cache).items():
            got = _run(run, texts)
            yield Check(
                what=f"{name}, {dtype}, {way}",
                error=_most(got, want) if dtype == "fp32" else _rms(got, want),
                bound=bounds[dtype],
                strays=sum(_strays(g, w, ties[dtype]) for g, w in zip(got, want, strict=True)),
            )


def parity(device: torch.device, shape: str) -> Iterator[Check]:
    """A published shape in fp32 and bf16; or "tiny": every variant, in every dtype."""
    if shape in OPT_SHAPES:
        yield from check_model(shape, OPT_SHAPES[shape], device, ["fp32", "bf16"], 0.02)
        return
    for name, config in TINY.items():
        yield from check_model(name, config, device, list(DTYPES), 0.08)
    name = "head width 64"
    yield from check_model(f"{name}, sums over a group", TINY[name], device, ["bf16"], 0.08, _grouped(device))


def kernels(device: torch.device) -> Iterator[Check]:
    """The kernels alone, against plain torch on the same numbers: every width, long contexts, many sequences."""
    ours = gpu_kernels(device)
    if ours is None:
        return
    yield from alone(ours, device, WIDTHS)
    x, weight = torch.ones(40, 64, device=device), torch.ones(32, 64, device=device)
    weight[3, 5] = torch.nan
    for dtype in DTYPES.values():
        linear = Linear(ParallelContext(device=device), dtype)
        linear.keep(weight, torch.zeros(32))
        hidden = int((~linear(x.to(dtype), "relu")[:, 3].isnan()).sum())
        yield Check(what=f"NaNs that ReLU of many rows hides, {dtype}", error=hidden, bound=0)


def early(device: torch.device) -> Iterator[Check]:
    """The kernels and a step where each may start before the one before has ended: not what serves, until it is."""
    ours = gpu_kernels(device, early=True)
    if ours is not None and starts_early(device):
        yield from alone(ours, device, EARLY_WIDTHS)
        for name in ("head width 64", "head width 128"):
            yield from check_model(name, TINY[name], device, ["bf16"], 0.08, early=True)


def alone(
    ours: reference.Kernels, device: torch.device, widths: Mapping[str, tuple[int, ...]], *, inputs: int = 5120
) -> Iterator[Check]:
    """These kernels in some dtypes, attention for heads of some widths, linear layers of so many inputs."""
    generator = torch.Generator(device).manual_seed(0)
    for dtype in widths:
        atol = KERNEL_ATOL[dtype]
        for width in widths[dtype]:
            for contexts in ([2048], [1, 700, 0, 33], [200 + i for i in range(40)]):
                got, want = _decode_both(ours.decode_attention, contexts, width, DTYPES[dtype], device, generator)
                name = f"decode attention, {dtype}, head width {width}, {len(contexts)} sequences"
                yield Check(what=name, error=float((got.float() - want.float()).abs().max()), bound=atol)
        wide = 3 * inputs
        shapes = [(1, inputs), (wide, inputs), (wide,), (1, wide), (inputs,), (inputs,), (70, inputs), (70, inputs)]
        made = [torch.randn(s, generator=generator, device=device).to(DTYPES[dtype]) for s in shapes]
        x, w, b, r, norm_w, norm_b, xs, ys = made
        norm = reference.NormWeights(norm_w, norm_b, 1e-5)
        for name, kind in (("", None), (" with a norm", norm)):
            got, want = (k.row_linear(x, w, b, r, norm=kind, relu=True) for k in (ours, reference.PLAIN))
            yield Check(what=f"one-row linear{name}, {dtype}", error=_relative(got, want), bound=atol)
        sums = [k.add_norm(xs, ys, norm) for k in (ours, reference.PLAIN)]
        for name, got, want in zip(("sum", "norm of a sum"), *sums, strict=True):
            yield Check(what=f"{name}, {dtype}", error=_relative(got, want), bound=atol)


def _relative(got: Tensor, want: Tensor) -> float:
    """The largest error beside its number, or beside what is usual where that is smaller."""
    wanted = want.float()
    return float(((got.float() - wanted).abs() / (wanted.std() + wanted.abs())).max())


def _decode_both(
    kernel: reference.DecodeAttention,
    contexts: list[int],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    num, heads, size, widest = len(contexts), 5, 32, 64
    shape = (num * widest, heads, size, width)
    pools = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
    qkv = torch.randn(num, 3, heads, width, generator=generator, device=device).to(dtype)
    found = []
    for run in (kernel, reference.decode_attention):
        keys, values = (pool.clone() for pool in pools)
        out = torch.full((num, heads * width), torch.nan, device=device, dtype=dtype)
        q, k, v = qkv.unbind(1)
        run(
            q,
            k,
            v,
            keys,
            values,
            rows_B=torch.arange(num, device=device, dtype=torch.int32),
            tables_BN=torch.randperm(num * widest, generator=generator.manual_seed(1), device=device)
            .int()
            .view(num, -1),
            contexts_B=torch.tensor(contexts, device=device, dtype=torch.int32),
            scale=width**-0.5,
            out_TX=out,
        )
        found.append(torch.cat([x.flatten() for x in (out, keys, values)]))
    return found[0], found[1]


def _theirs(
    config: ModelConfig, weights: DeviceWeights, device: torch.device, dtype: str, texts: list[list[int]]
) -> list[Tensor]:
    model = peer.hugging_face(config, weights, device, DTYPES[dtype])
    return [peer.logits(model, text) for text in texts]


@torch.inference_mode()
def _run(run: Run, texts: list[list[int]]) -> list[Tensor]:
    """Feed three texts: two whole, the third in chunks beside them; then all by single tokens, alone and together."""
    done, fed = [0, 0, 0], [[], [], []]  # type: tuple[list[int], list[list[Tensor]]]
    tables = [[3, 0, 17, 2], [9, 30, 1], [21, 4, 33, 5, 6]]

    def step(*ordered: tuple[int, int]) -> None:
        items = [
            BatchItem(
                start=done[s],
                token_ids=tuple(texts[s][done[s] : done[s] + num]),
                block_ids=tuple(tables[s][: -(-(done[s] + num) // BLOCK)]),
                num_logits=num,
                num_prompt=0 if num == 1 else num,
            )
            for s, num in ordered
        ]
        parts = torch.split(run(Batch(items=tuple(items))), [num for _, num in ordered])
        for (s, num), part in zip(ordered, parts, strict=True):
            fed[s].append(part)
            done[s] += num

    step((0, 30), (1, 20))
    step((0, 1), (2, 25), (1, 1))
    step((1, 1), (0, 1), (2, 33))
    while left := [s for s in range(3) if done[s] < len(texts[s])]:
        step(*((s, 1) for s in left))
    return [torch.cat(parts) for parts in fed]


def _strays(got: Tensor, want: Tensor, tie: float) -> int:
    """Positions where another token is likeliest, though in `want` it lies more than `tie` below the likeliest."""
    ours = want.gather(1, got.argmax(-1, keepdim=True))[:, 0]
    return int((want.max(-1).values - ours > tie).sum())


def _most(got: list[Tensor], want: list[Tensor]) -> float:
    return float((torch.cat(got) - torch.cat(want)).abs().max())  # NaN where there is one


def _rms(got: list[Tensor], want: list[Tensor]) -> float:
    return float((torch.cat(got) - torch.cat(want)).square().mean().sqrt())


def _text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(4, 4000, (length - 1,), generator=generator).tolist()]
