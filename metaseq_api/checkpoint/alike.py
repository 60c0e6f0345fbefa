"""Reads a pickle that differs from one already read in single numbers only, without reading it all again.

The shards of a checkpoint say the same of themselves but for a padding, a rank or a clock. What is the same is shared
by all of them, so that a thousand files cost the time and memory of a few. Where anything else differs, this says so,
and the whole pickle is read. Knows where the first pickle's numbers lie; does not know what they mean.
"""

from __future__ import annotations

import copy
import io
import pickle
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from metaseq_api.checkpoint.unpickle import Machine, Stub, run

PROTOCOL_2 = b"\x80\x02"
"""How torch.save begins a pickle; later protocols have frames, in which places are not those of the file."""
_FORMS = {op[0]: struct.Struct(form) for op, form in ((b"K", "<B"), (b"M", "<H"), (b"J", "<i"), (b"G", ">d"))}
"""Numbers by their opcodes: BININT1, BININT2, BININT, BINFLOAT."""

_KEYS = (str, int)
MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class _Number:
    """A number that is the value of a dict or an item of a list, and nothing else. Units: bytes of the pickle."""

    start: int
    stop: int
    holder: Any
    key: Any


class _Recorder(Machine):
    """Remembers where in the pickle the numbers in dicts and lists came from."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        super().__init__(self._data)
        self.numbers: list[_Number] = []
        self._pushed: dict[tuple[int, int], tuple[Any, int]] = {}

    def _push(self, opcode: int) -> None:
        start = self._data.tell() - 1
        (value,) = _FORMS[opcode].unpack(self.read(_FORMS[opcode].size))
        self._pushed[len(self.metastack), len(self.stack)] = value, start
        self.append(value)

    def _note(self, slot: tuple[int, int], value: Any, holder: Any, key: Any) -> None:
        pushed, start = self._pushed.pop(slot, (None, 0))
        if type(value) in (int, float) and pushed is value and isinstance(holder, (dict, list)) and type(key) in _KEYS:
            size = _FORMS[self._data.getbuffer()[start]].size
            self.numbers.append(_Number(start, start + 1 + size, holder, key))

    def load_append(self) -> None:
        slot, target = (len(self.metastack), len(self.stack) - 1), self.stack[-2]
        value = self.stack[-1]
        super().load_append()
        if type(target) is list:
            self._note(slot, value, target, len(target) - 1)

    def load_appends(self) -> None:
        depth, values, target = len(self.metastack), list(self.stack), self.metastack[-1][-1]
        super().load_appends()
        if type(target) is list:
            for i, value in enumerate(values):
                self._note((depth, i), value, target, len(target) - len(values) + i)

    def load_setitem(self) -> None:
        slot, (target, key, value) = (len(self.metastack), len(self.stack) - 1), self.stack[-3:]
        super().load_setitem()
        self._note(slot, value, target, key)

    def load_setitems(self) -> None:
        depth, pairs, target = len(self.metastack), list(self.stack), self.metastack[-1][-1]
        super().load_setitems()
        for i in range(1, len(pairs), 2):
            self._note((depth, i), pairs[i], target, pairs[i - 1])

    dispatch: ClassVar[dict[int, Any]] = Machine.dispatch | {
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }
    dispatch |= {opcode: lambda self, opcode=opcode: self._push(opcode) for opcode in _FORMS}


class Pattern:
    """A pickle that was read: `tree` is what it says. Raises: ValueError where it is damaged."""

    def __init__(self, data: bytes) -> None:
        recorder = _Recorder(data)
        self.data = data
        self.tree: Any = run(recorder)[0]
        numbers = recorder.numbers if data.startswith(PROTOCOL_2) else []
        times = Counter((id(number.holder), number.key) for number in numbers)
        once = (number for number in numbers if times[id(number.holder), number.key] == 1)
        self._numbers = sorted(once, key=lambda number: number.start)
        self._starts = [number.start for number in self._numbers]
        self._holders, self._twice = _holders(self.tree)

    def read(self, data: bytes) -> Any:
        """Say what another pickle says, sharing what is the same; None where more than single numbers differ."""
        changes, at, other = [], 0, 0
        while (same := _same(self.data, at, data, other)) < max(len(self.data) - at, len(data) - other):
            index = bisect_right(self._starts, at + same) - 1
            if index < 0 or not at <= self._starts[index] <= at + same < self._numbers[index].stop:
                return None
            number = self._numbers[index]
            other += number.start - at
            form = _FORMS.get(data[other]) if other < len(data) else None
            if form is None or other + 1 + form.size > len(data) or not self._can_change(number.holder):
                return None
            changes.append((number, form.unpack_from(data, other + 1)[0]))
            at, other = number.stop, other + 1 + form.size
        return self._changed(changes)

    def _can_change(self, holder: Any) -> bool:
        """Whether it and all above it are held once, none by a tuple or in a Stub's arguments."""
        for _ in range(MAX_DEPTH):
            if id(holder) in self._twice:
                return False
            above, key = self._holders[id(holder)]
            if above is None:
                return True
            if key is None:
                return False
            holder = above
        return False

    def _changed(self, changes: list[tuple[_Number, Any]]) -> Any:
        """The tree with other numbers in copies of what holds them, and of what holds that, up to the root."""
        made: dict[int, Any] = {}

        def own(holder: Any) -> Any:
            if id(holder) not in made:
                made[id(holder)] = new = copy.copy(holder)
                above, key = self._holders[id(holder)]
                if above is not None:
                    _set(own(above), key, new)
            return made[id(holder)]

        for number, value in changes:
            _set(own(number.holder), number.key, value)
        return own(self.tree) if changes else self.tree


def _set(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, Stub):
        holder.state = value
    else:
        holder[key] = value


def _holders(tree: Any) -> tuple[dict[int, tuple[Any, Any]], set[int]]:
    """What holds each container of a tree, and where (None: where it cannot be replaced); which are held twice."""
    found: dict[int, tuple[Any, Any]] = {id(tree): (None, None)}
    twice: set[int] = set()
    waiting = [tree]
    while waiting:
        holder = waiting.pop()
        for key, value in _inner(holder):
            if isinstance(value, (dict, list, tuple, Stub)):
                if id(value) in found:
                    twice.add(id(value))
                else:
                    found[id(value)] = holder, key
                    waiting.append(value)
    return found, twice


def _inner(holder: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(holder, dict):
        return holder.items()
    if isinstance(holder, list):
        return enumerate(holder)
    if isinstance(holder, tuple):
        return ((None, value) for value in holder)
    return (("state", holder.state), (None, holder.args), (None, holder.items), (None, holder.values))


def _same(one: bytes, at: int, two: bytes, other: int) -> int:
    """How many bytes from these places on are the same."""
    low, high = 0, min(len(one) - at, len(two) - other)
    step = 1 << 12
    while low < high:
        step = min(step, high - low)
        if one[at + low : at + low + step] == two[other + low : other + low + step]:
            low += step
        elif step == 1:
            return low
        else:
            high, step = low + step, max(1, step // 2)
    return low
