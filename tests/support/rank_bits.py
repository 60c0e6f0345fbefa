"""One answer, computed in many ways on this rank, must have the same bits in all. Run as a program: one gloo rank."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence

import torch
from support.steps import Driver
from torch import Tensor

from metaseq_api.core import ModelConfig
from metaseq_api.model.weights import RandomWeights
from metaseq_api.parallel import shared
from metaseq_api.parallel.context import ParallelContext, join, leave

DTYPES = (torch.float32, torch.bfloat16)
SHAPES: dict[str, dict[str, int | bool]] = {
    "heads of 64": {"hidden_dim": 256, "num_heads": 4, "ffn_dim": 1024},
    "heads of 80, blocks of 32": {"hidden_dim": 320, "num_heads": 4, "ffn_dim": 640, "block_size": 32},
    "heads of 128": {"hidden_dim": 256, "num_heads": 2, "ffn_dim": 2048},
    "heads of 8": {"hidden_dim": 32, "num_heads": 4, "ffn_dim": 64},
    "one head, blocks of 16": {"hidden_dim": 64, "num_heads": 1, "ffn_dim": 128, "block_size": 16},
    "350m": {"hidden_dim": 64, "num_heads": 4, "ffn_dim": 128, "embed_dim": 32, "pre_norm": False, "final_norm": False},
}
PROMPT, GENERATED = 90, 45
Way = Callable[["Case"], Tensor]


class Case:
    """A model, the tokens to be fed (the first PROMPT are the prompt's), and blocks drawn anew for each way."""

    def __init__(self, shape: str, dtype: torch.dtype, context: ParallelContext) -> None:
        sizes = {"num_layers": 2, "vocab_size": 160, "max_positions": 192} | SHAPES[shape]
        self.size = int(sizes.pop("block_size", 8))
        config = ModelConfig(**sizes)  # type: ignore[arg-type]
        weights = RandomWeights(config, std=0.08)
        self.driver = Driver(config, weights, context=context, dtype=dtype, num_blocks=400, block_size=self.size)
        self.random = random.Random(shape)
        self.tokens = self.draw(PROMPT + GENERATED)

    def draw(self, num: int) -> list[int]:
        return [self.random.randrange(4, 160) for _ in range(num)]

    def blocks(self, num_tokens: int = PROMPT + GENERATED, avoid: Sequence[int] = ()) -> list[int]:
        """Blocks in any order, which may lie close together or far apart, full of what was there before."""
        among = sorted(set(range(self.random.choice([60, 400]))) - set(avoid))
        return self.random.sample(among, -(-num_tokens // self.size))

    def feed(self, cuts: Sequence[int], blocks: list[int], since: int = 0) -> Tensor:
        """Logits from `since` on, fed up to each of the cuts in turn."""
        got = []
        for start, stop in zip([since, *cuts], cuts, strict=False):
            got += self.driver.step((self.tokens[:stop], start, blocks), prompts=[PROMPT])
        return torch.cat(got) if got else torch.empty(0)


def one_by_one(case: Case) -> Tensor:
    """The prompt at once, then a token a step."""
    return case.feed(range(PROMPT, PROMPT + GENERATED + 1), case.blocks())


def in_chunks(case: Case) -> Tensor:
    cuts = sorted(case.random.sample(range(1, PROMPT + GENERATED), 12))
    return case.feed([*cuts, PROMPT + GENERATED], case.blocks())


def a_token_a_step(case: Case) -> Tensor:
    return case.feed(range(1, PROMPT + GENERATED + 1), case.blocks())


def computed_anew(case: Case) -> Tensor:
    """As after a preemption: what was generated is fed again in one step with the prompt."""
    return case.feed([PROMPT + GENERATED], case.blocks())


def found(case: Case) -> Tensor:
    """The head's blocks were computed for a longer prompt; the logits of what they hold are left as they were."""
    other, blocks = [*case.tokens[:70], *case.draw(30)], case.blocks()
    head = 70 // case.size * case.size
    whole = case.driver.step((other, 0, [*blocks[: head // case.size], *case.blocks(64, blocks)]), prompts=[len(other)])
    rest = case.feed([PROMPT, *range(PROMPT + 1, PROMPT + GENERATED + 1)], blocks, since=head)
    return torch.cat([whole[0][:head], rest]) if whole else rest


def beside_others(case: Case) -> Tensor:
    """In steps with prompts and with tokens of five sequences that share the head, one that does not, and a longer."""
    blocks, taken = case.blocks(), list[int]()
    got = case.driver.step((case.tokens[:PROMPT], 0, blocks), (case.tokens[:40], 0, case.blocks(40, blocks)))[:1]
    taken += blocks
    shared = PROMPT // case.size
    tables = []
    for _ in range(5):
        tables.append([*blocks[:shared], *case.blocks(GENERATED + case.size, taken)])
        taken += tables[-1]
    others = [[*case.tokens[: shared * case.size], *case.draw(GENERATED + 20)] for _ in tables]
    long = case.draw(160)
    tables.append(case.blocks(170, taken))
    case.driver.step((long[:140], 0, tables[-1]))
    for n in range(GENERATED):
        at = shared * case.size + n
        items = [(o[: at + 1], at, t) for o, t in zip(others, tables, strict=False)]
        items.append((long[: 141 + n % 19], 140 + n % 19, tables[-1]))
        items = case.random.sample(items, n % 6 + 1) if n >= 1 and n % 2 else items
        at = case.random.randrange(len(items) + 1)
        items.insert(at, (case.tokens[: PROMPT + n + 1], PROMPT + n, blocks))
        logits = case.driver.step(*items)
        got += logits[at : at + 1]
    return torch.cat(got) if got else torch.empty(0)


def beside_unwanted(case: Case) -> Tensor:
    """A few of a step's rows go on to the end, or none."""
    blocks = case.blocks()
    got = case.driver.step((case.tokens[:PROMPT], 0, blocks))
    other, table = case.draw(190), case.blocks(190, blocks)
    case.driver.step((other[:10], 0, table), wanted=[0])
    for n in range(GENERATED):
        item = (case.tokens[: PROMPT + n + 1], PROMPT + n, blocks)
        got += case.driver.step((other[: 14 + 4 * n], 10 + 4 * n, table), item, wanted=[0, 1])[1:]
    return torch.cat(got) if got else torch.empty(0)


def layer_by_layer(case: Case) -> Tensor:
    """Also where all layers could be run in one call."""
    model = case.driver.model
    kept, model.stack = model.stack, None
    try:
        return in_chunks(case)
    finally:
        model.stack = kept


WAYS: tuple[Way, ...] = (
    *(in_chunks, in_chunks, in_chunks, a_token_a_step, computed_anew, found),
    *(beside_others, beside_unwanted, layer_by_layer),
)


def check(shape: str, dtype: torch.dtype, context: ParallelContext) -> None:
    case = Case(shape, dtype, context)
    want = one_by_one(case)
    for way in WAYS:
        got = way(case)
        differ = (got != want).any(-1).nonzero().flatten().tolist() if context.is_driver else []
        assert torch.equal(got, want), f"{way.__name__}: positions {differ[:9]} differ"


def main() -> None:
    rank, size, store, node = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    shared.SLOT = int(sys.argv[5])
    context = join(rank=rank, world_size=size, init=f"file://{store}", device=cpu, timeout_s=60, node=node)
    assert (context.memory is not None) == (node is not None)
    if context.memory is not None and rank == 1:  # it has Python hear every sum that is not there at once
        context.memory.state.looks = 0
    for dtype in DTYPES:
        for shape in ("heads of 64", "350m"):
            check(shape, dtype, context)
    context.wait_for_all("done", timeout_s=60)
    leave(context)
    sys.stdout.flush()
    os._exit(0)  # as a service's ranks end: a library's teardown may abort


if __name__ == "__main__":
    main()
