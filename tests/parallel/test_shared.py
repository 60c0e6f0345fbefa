"""Ranks of one machine sum through memory they share; here each is a thread, whose memory it is as well."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from metaseq_api.parallel import shared
from metaseq_api.parallel.shared import SLOT, SharedMemory, share


class Store:
    """What torch's own does between processes."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 30), key
            return self._values[key]


def together(num_ranks: int, call: Callable[[int], Any]) -> list[Any]:
    """What each rank gets."""
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(call, range(num_ranks)))


def ranks(num_ranks: int, timeout_s: float = 30.0) -> list[SharedMemory]:
    store = Store()
    found = together(num_ranks, lambda r: share(store, r, num_ranks, "here", timeout_s))
    assert all(isinstance(f, SharedMemory) for f in found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_sums_and_gathers_of_any_size_come_out_the_same_on_all(num_ranks: int, dtype: torch.dtype) -> None:
    memory = ranks(num_ranks)
    rows = SLOT // dtype.itemsize // 768
    sizes = [(1, 768), (0, 768), (3, 5), (rows + 1, 768), (1, 1), (3 * rows, 768)] * 3
    given = [[torch.randn(size).to(dtype) for size in sizes] for _ in memory]

    def run(rank: int) -> list[Any]:
        sums = [memory[rank].all_reduce(x.clone()) for x in given[rank]]
        return [sums, [memory[rank].gather(x) for x in given[rank]]]

    found = together(num_ranks, run)
    for i in range(len(sizes)):
        of = [g[i] for g in given]
        total = torch.stack(of).double().sum(0)
        for sums, _ in found:
            assert torch.equal(sums[i], found[0][0][i])
            atol = 2 * num_ranks * torch.finfo(dtype).eps
            torch.testing.assert_close(sums[i].double(), total, atol=atol, rtol=torch.finfo(dtype).eps)
        assert all(torch.equal(a, b) for a, b in zip(found[0][1][i], of, strict=True))
        assert all(gathered[i] is None for _, gathered in found[1:])


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    memory = ranks(3)
    given = [torch.randn(40, 768).bfloat16() for _ in memory]
    whole = together(3, lambda r: memory[r].all_reduce(given[r].clone()))[0]
    for row in (0, 7, 39):
        alone = together(3, lambda r, row=row: memory[r].all_reduce(given[r][row : row + 1].clone()))[0]
        assert torch.equal(alone[0], whole[row])


def test_a_slow_rank_loses_nothing() -> None:
    first, second = ranks(2)
    going = threading.Event()

    def late() -> list[float]:
        going.wait()
        return [float(second.all_reduce(torch.full((4,), float(i)))[0]) for i in range(50)]

    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(late)
        fast = threads.submit(lambda: [float(first.all_reduce(torch.ones(4))[0]) for _ in range(50)])
        assert not fast.done()
        going.set()
        assert fast.result() == slow.result() == [i + 1.0 for i in range(50)]


def test_a_rank_that_says_nothing_is_given_up_in_time() -> None:
    first, _ = ranks(2, timeout_s=0.3)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.3 s of waiting for rank 1"):
        first.all_reduce(torch.ones(4))


def test_a_rank_whose_process_has_ended_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = ranks(2)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        monkeypatch.setattr(first, "_pids", [os.getpid(), ended.pid])
        with pytest.raises(RuntimeError, match="process of its peer, rank 1, is gone"):
            first.all_reduce(torch.ones(4))


def test_a_rank_that_breaks_off_is_noticed_by_one_that_waits() -> None:
    first, second = ranks(2)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(first.all_reduce, torch.ones(4))
        second.break_off()
        with pytest.raises(RuntimeError, match="peer, rank 1, was broken off"):
            waits.result(10)


@pytest.mark.parametrize("nodes", [["a", "b"], ["a", "a"]], ids=["two nodes", "no memory"])
def test_ranks_that_cannot_share_all_know_it(nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.os, "memfd_create", refuse)
    store = Store()
    assert together(2, lambda r: share(store, r, 2, nodes[r], 30)) == [None, None]


def test_a_file_that_is_not_rank_0s_is_not_taken() -> None:
    store = Store()
    store.set("shared/where", f'["/proc/{os.getpid()}/fd/0", "00"]')  # what rank 0 would have said

    class Late(Store):
        """Rank 0's word is already there."""

        def set(self, key: str, value: str) -> None:
            if key != "shared/where":
                store.set(key, value)

        def get(self, key: str) -> str:
            return store.get(key)

    assert together(2, lambda r: share(Late(), r, 2, "here", 30)) == [None, None]
