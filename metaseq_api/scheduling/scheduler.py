"""Decides what the next step computes. Plain Python over integers; owns every Sequence and its blocks.

The rules, in their order:
1. every running sequence whose prompt is in the cache gets its one token;
2. running sequences whose prompt is not, then waiting ones, get what is left of the step's budget of tokens, in chunks;
   tenants share what is computed by weight (`fair`); of one tenant's requests the lowest priority comes first; of equal
   ones the one with fewest sequences running, then the one that came first;
3. where blocks run out, the youngest running sequence gives its blocks back and waits at the head of the queue (its
   tokens are kept and computed again), so that the oldest always gets on;
4. a sequence starts with the full blocks of its head that the cache has, whoever computed them; where most of what is
   missing is just being computed for another sequence (its first sample, or any request), it waits for that.

With `prefix_cache` off, nothing is found by content: only the samples of one prompt share its blocks.

Does not know tensors, text, sampling, or time.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from metaseq_api.core import Batch, BatchItem, Sequence, Status
from metaseq_api.core.batch import UNKNOWN
from metaseq_api.scheduling.blocks import BlockPool, block_key
from metaseq_api.scheduling.fair import FairQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A Batch, and whose items they are (parallel to batch.items)."""

    batch: Batch
    sequences: tuple[Sequence, ...]

    def refer_to(self, drawn: Mapping[int, int]) -> None:
        """Name tokens that are not known yet by their rows in what the step before drew, by seq_id."""
        for seq, item in zip(self.sequences, self.batch.items, strict=True):
            if item.token_ids[-1] == UNKNOWN:
                assert isinstance(item.token_ids, list)
                item.token_ids[-1] = -1 - drawn[seq.seq_id]


class Scheduler:
    """All sequences that wait or run. Called by the engine's thread alone."""

    def __init__(
        self, pool: BlockPool, *, max_batch_tokens: int, max_batch_size: int, prefix_cache: bool = True
    ) -> None:
        assert max_batch_tokens > 0
        assert max_batch_size > 0
        self.pool = pool
        self.prefix_queries_tokens = 0  # of prompts that were looked up, and of those that were found
        self.prefix_hits_tokens = 0
        self.num_preemptions = 0
        self._by_content = prefix_cache
        self._max_tokens = max_batch_tokens
        self._max_size = max_batch_size
        self._preempted: deque[Sequence] = deque()
        self._waiting: dict[int, deque[Sequence]] = {}  # by request
        self._turns: FairQueue[int] = FairQueue()  # of these requests
        self._running: list[Sequence] = []  # oldest first
        self._coming: dict[bytes, Sequence] = {}  # keys of prompt blocks that are being computed, and for whom

    @property
    def num_waiting(self) -> int:
        return len(self._preempted) + sum(map(len, self._waiting.values()))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, which must fit into the pool when it is alone."""
        most = max(seq.prompt_len, seq.max_len - 1)  # the last token is never fed
        assert self.pool.blocks_for(most) <= self.pool.num_blocks
        self._waiting.setdefault(seq.group, deque()).append(seq)
        if seq.group not in self._turns:
            self._turns.push(seq.group, tenant=seq.tenant, weight=seq.weight, priority=seq.priority)

    def finish(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands; its blocks are free at once. Harmless when it is out already."""
        if seq.status is Status.RUNNING:
            self._running.remove(seq)
        elif seq.status is Status.WAITING:
            self._leave_queue(seq)
        self._release(seq)
        seq.status = Status.FINISHED
        seq.leader = None

    def discard(self, seq: Sequence) -> None:
        """Take a sequence out whose values are not numbers: nobody shall find them again."""
        self.finish(seq)
        self.pool.forget(seq.block_keys)

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to do. A step that was scheduled must be run and applied.

        A sequence's last token need not be known yet (`UNKNOWN`): a GPU feeds what it drew itself.
        """
        items: list[tuple[Sequence, int]] = []
        budget = self._max_tokens
        decoding, prefilling = list[Sequence](), list[Sequence]()
        for seq in self._running:
            if (num := seq.num_uncached) == 1 and not seq.is_full:
                decoding.append(seq)
            elif num > 1:
                prefilling.append(seq)
        for seq in decoding:
            if budget and self._grow(seq, 1):
                items.append((seq, 1))
                budget -= 1
        for seq in prefilling:
            budget -= self._take(seq, budget, items)
        # a sequence scheduled above may since have been preempted for an older one; then nobody new comes in
        still = [(seq, num) for seq, num in items if seq.status is Status.RUNNING]
        full, items = len(still) < len(items), still
        while budget and not full and len(self._running) < self._max_size:
            first = self._next_waiting()
            if first is not None and self._must_wait(first):
                continue
            if first is None or not self._admit(first):
                break
            budget -= self._take(first, budget, items)
        if not items:
            left = [s for s in self._running if s.num_uncached and not s.is_full]
            assert not left, "running sequences but no step: the pool is too small for the oldest"
            return None
        return Step(
            batch=Batch(items=tuple(self._item(seq, num) for seq, num in items)),
            sequences=tuple(seq for seq, _ in items),
        )

    def apply(self, step: Step, tokens: dict[int, int]) -> None:
        """Note that a step has run: the cache holds what was fed, and `tokens` (by seq_id) were sampled."""
        for seq, item in zip(step.sequences, step.batch.items, strict=True):
            if seq.status is Status.RUNNING:
                seq.num_cached += item.num_tokens
                self._turns.charge(seq.tenant, item.num_tokens)
                if self._by_content and item.start < seq.prompt_len:
                    self._keep(seq, min(seq.num_cached, seq.prompt_len))
                if seq.seq_id in tokens:
                    seq.token_ids.append(tokens[seq.seq_id])

    def count_idle(self) -> None:
        """Assert that no block was leaked, when nothing waits or runs: by counting, which costs no request any time."""
        if not self.num_waiting and not self._running:
            assert not self._coming
            assert self.pool.num_free == self.pool.num_blocks, (self.pool.num_free, self.pool.num_blocks)

    def check_idle(self) -> None:
        """The same and more, block by block: 1.5 ms for 16384 of them (2026-11-29)."""
        self.count_idle()
        if not self.num_waiting and not self._running:
            self.pool.check_idle()

    def _take(self, seq: Sequence, budget: int, items: list[tuple[Sequence, int]]) -> int:
        """Schedule as much of a prefill as budget and blocks allow; how many tokens that was."""
        num = min(seq.num_uncached, budget)
        if seq.status is not Status.RUNNING or num == 0 or not self._grow(seq, num):
            return 0
        items.append((seq, num))
        return num

    def _grow(self, seq: Sequence, num: int) -> bool:
        """Give a running sequence the blocks for `num` more tokens, if need be from the youngest ones."""
        if seq.status is not Status.RUNNING:
            return False
        missing = self.pool.blocks_for(seq.num_cached + num) - len(seq.block_ids)
        while missing > self.pool.num_free:
            youngest = self._running[-1]
            if youngest is seq and len(self._running) > 1:
                self._preempt(seq)
                return False
            assert youngest is not seq, "the pool is too small for one sequence"
            self._preempt(youngest)
        if missing > 0:
            seq.block_ids += self.pool.allocate(missing)
        return True

    def _next_waiting(self) -> Sequence | None:
        """Whose turn it is, of those that need not wait for their leader's prompt."""
        if self._preempted:
            return self._preempted[0]
        if not self._waiting:  # as in most steps
            return None
        running = Counter(s.group for s in self._running)
        for groups in self._turns.turns():
            best: Sequence | None = None
            for group in groups:
                if best is None or running[group] < running[best.group]:
                    best = next((s for s in self._waiting[group] if not _waits_for_leader(s)), best)
                    if best is not None and not running[best.group]:
                        return best
            if best is not None:
                return best
        return None

    def _admit(self, seq: Sequence) -> bool:
        """Start a sequence if the blocks of all its tokens are free (minus those it shares); else leave it."""
        shared = self._shared(seq)
        needed = self.pool.blocks_for(len(seq.token_ids)) - len(shared)
        if needed > self.pool.num_free_beside(shared):
            return False
        if seq.group in self._turns:
            self._turns.take_turn(seq.group)
        self._leave_queue(seq)
        self.pool.share(shared)
        seq.block_ids = list(shared)
        seq.num_cached = len(shared) * self.pool.block_size
        seq.leader = None
        seq.status = Status.RUNNING
        self._running.append(seq)
        if self._by_content:
            if not seq.num_preemptions:
                self.prefix_queries_tokens += seq.prompt_len
                self.prefix_hits_tokens += seq.num_cached
            for key in self._keys(seq, seq.prompt_len)[len(shared) :]:
                self._coming.setdefault(key, seq)
        return True

    def _shared(self, seq: Sequence) -> list[int]:
        """The full blocks of its head that a sequence need not compute.

        At least one token is computed again: its logits are what the next sample is drawn from. A prompt to be scored
        is computed whole.
        """
        most = (len(seq.token_ids) - 1) // self.pool.block_size
        if seq.scores_prompt:
            return []
        if self._by_content:
            return self.pool.find(self._keys(seq, most * self.pool.block_size))
        if seq.leader is not None and seq.leader.status is Status.RUNNING:
            return seq.leader.block_ids[:most]
        return []

    def _must_wait(self, seq: Sequence) -> bool:
        """Whether most of what a new sequence would compute is being computed for a running one, now its leader."""
        if not self._by_content or seq.scores_prompt or seq.num_preemptions or not self._coming:
            return False
        keys, found = self._keys(seq, seq.prompt_len - 1), len(self._shared(seq))
        leader = self._coming.get(keys[found]) if found < len(keys) else None
        common = found
        while common < len(keys) and self._coming.get(keys[common]) is leader:
            common += 1
        size = self.pool.block_size
        if leader is None or 2 * (common - found) * size < seq.prompt_len - found * size:
            return False
        seq.leader, seq.common_len = leader, common * size
        return True

    def _keys(self, seq: Sequence, num_tokens: int) -> list[bytes]:
        """The keys of the full blocks among a sequence's first tokens."""
        keys, size = seq.block_keys, self.pool.block_size
        for at in range(len(keys) * size, num_tokens - size + 1, size):
            prompted = min(max(seq.prompt_len - at, 0), size)
            keys.append(block_key(keys[-1] if keys else b"", seq.token_ids[at : at + size], prompted))
        return keys[: num_tokens // size]

    def _keep(self, seq: Sequence, num_tokens: int) -> None:
        """Make the full blocks of a sequence's first tokens, which the cache holds, findable."""
        for i, key in enumerate(self._keys(seq, num_tokens)):
            seq.block_ids[i] = self.pool.keep(seq.block_ids[i], key)
            if self._coming.get(key) is seq:
                del self._coming[key]

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._preempted.appendleft(seq)

    def _leave_queue(self, seq: Sequence) -> None:
        if seq in self._preempted:
            self._preempted.remove(seq)
        elif seq in (queue := self._waiting.get(seq.group, deque())):
            queue.remove(seq)
            if not queue:
                del self._waiting[seq.group]
                self._turns.remove(seq.group)

    def _release(self, seq: Sequence) -> None:
        """Let go of a sequence's blocks; it can find what it generated again if it was preempted."""
        if self._by_content:
            self._keep(seq, seq.num_cached)
            for key in seq.block_keys:
                if self._coming.get(key) is seq:
                    del self._coming[key]
        self.pool.free(seq.block_ids)
        seq.block_ids = []
        seq.num_cached = 0

    def _item(self, seq: Sequence, num: int) -> BatchItem:
        start, stop = seq.num_cached, seq.num_cached + num
        ends = stop == len(seq.token_ids)
        scoring = seq.scores_prompt and start < seq.prompt_len - 1
        return BatchItem(
            start=start,
            token_ids=seq.token_ids[start:stop],
            block_ids=seq.block_ids[: self.pool.blocks_for(stop)],
            num_logits=num if scoring else int(ends),
            num_prompt=min(max(seq.prompt_len - start, 0), num),
        )


def _waits_for_leader(seq: Sequence) -> bool:
    leader, common = seq.leader, seq.prompt_len if seq.common_len is None else seq.common_len
    return leader is not None and leader.status is not Status.FINISHED and leader.num_cached < common
