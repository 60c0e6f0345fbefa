"""What a step attends to, as the kernel of our own writes it down, and its tokens' rows, beside Python and torch."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch
from support.own_kernels import needs_own, own

from metaseq_api.core import Batch, BatchItem
from metaseq_api.kernels.structs import Step

pytestmark = needs_own
SIZE = 16


def items(numbers: random.Random) -> list[BatchItem]:
    """Generated tokens, prompts, their chunks, and prompts with generated tokens behind them."""
    found = []
    for _ in range(numbers.randrange(1, 9)):
        start, num = numbers.choice([0, 3, 16, 50]), numbers.choice([1, 1, 5, 40])
        found.append(
            BatchItem(
                start=start,
                token_ids=[numbers.randrange(1000) for _ in range(num)],
                block_ids=numbers.sample(range(500), -(-(start + num) // SIZE)),
                num_logits=numbers.choice([0, 1, num]),
                num_prompt=numbers.choice([0, num, num // 2]),
            )
        )
    return found


def at(address: int | None, num: int) -> list[int]:
    """So many 32-bit integers."""
    return list((ctypes.c_int32 * num).from_address(address)) if address and num else []


@pytest.mark.parametrize("pieces", [True, False])
def test_a_plan_says_of_every_token_where_it_goes_and_what_it_sees(pieces: bool) -> None:
    numbers = random.Random(7)
    for _ in range(50):
        batch = Batch(items=tuple(items(numbers)))
        step, words = Step(num_tokens=batch.num_tokens, size=SIZE), batch.words
        room, wanted = own().plan(step, words, pieces=pieces)
        num, first = batch.num_tokens, 0
        tokens, singles, prompts, rows = list[tuple[int, ...]](), list[tuple[int, ...]](), list[tuple[int, ...]](), []
        for item in batch.items:
            places = range(item.start, item.context_len)
            tokens += [(t, p, item.block_ids[p // SIZE], p % SIZE) for t, p in zip(item.token_ids, places, strict=True)]
            singles += [
                (first + n, item.start + n + 1, *item.block_ids) for n in range(item.num_prompt, item.num_tokens)
            ]
            if item.num_prompt and pieces:
                prompts.append((first, first + item.num_prompt, item.start, *item.block_ids))
            rows += range(first + item.num_tokens - item.num_logits, first + item.num_tokens)
            first += item.num_tokens
        planned = (room[:num].tolist(), room[num : 2 * num].tolist(), at(step.block_T, num), at(step.offset_T, num))
        assert list(zip(*planned, strict=True)) == tokens
        assert wanted.tolist() == rows

        assert (step.num_single, step.num_pieces) == (len(singles), len(prompts))
        seen = zip(*(at(a, len(singles)) for a in (step.row_B, step.context_B, step.table_B)), strict=True)
        for (row, context, begin), want in zip(seen, singles, strict=True):
            assert (row, context, *words[begin : begin + len(want) - 2]) == want
        cut = zip(*(at(a, len(prompts)) for a in (step.begin_P, step.end_P, step.start_P, step.table_P)), strict=True)
        for (begin_, end, start, begin), want in zip(cut, prompts, strict=True):
            assert (begin_, end, start, *words[begin : begin + len(want) - 3]) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 16, 24, 100, 768])
def test_tokens_are_looked_up_with_torchs_bits(width: int, dtype: torch.dtype) -> None:
    table, positions = torch.randn(300, width).to(dtype), torch.randn(70, width).to(dtype)
    for num in (1, 15, 40):
        ids = torch.randint(300, (num,), dtype=torch.int32)
        places = torch.randint(70, (num,), dtype=torch.int32)
        assert own().embed(ids, places, table, positions).equal(table[ids.long()] + positions[places.long()])
