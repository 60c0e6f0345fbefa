"""The nouns as what JSON knows, and back: how a Request and its answer cross from one process to another.

A dataclass is the list of its fields, in order; a dict is a list of pairs. Knows the types by their annotations, and
reads each class's once. Does not know what is sent when. No class is named on the wire: who reads says what it expects.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from metaseq_api import errors
from metaseq_api.errors import MetaseqApiError, RequestError

T = TypeVar("T")
_Read = Callable[[Any], Any]


def to_plain(value: Any) -> Any:
    """A noun, or what one is made of, as lists, strings, numbers and None."""
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return [[to_plain(k), to_plain(v)] for k, v in list(value.items())]  # at once: another thread may count on
    assert dataclasses.is_dataclass(value), type(value)
    kind: Any = type(value)
    return [to_plain(getattr(value, name)) for name in _names(kind)]


def from_plain(kind: type[T], plain: Any) -> T:
    """The noun of this class that `to_plain` wrote."""
    wanted: Any = kind
    read = _reader(wanted)
    value: T = plain if read is None else read(plain)
    return value


def error_to_plain(error: MetaseqApiError) -> dict[str, Any]:
    """An error of `errors`, by the name of its class."""
    more = {k: getattr(error, k) for k in ("param", "code", "retry_after_s") if isinstance(error, RequestError)}
    return {"class": type(error).__name__, "message": str(error), **more}


def error_from_plain(plain: dict[str, Any]) -> MetaseqApiError:
    """The error that `error_to_plain` wrote."""
    kind = getattr(errors, plain.pop("class"))
    assert isinstance(kind, type)
    assert issubclass(kind, MetaseqApiError)
    message = plain.pop("message")
    return kind(message, **plain)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind) if f.init)


@cache
def _reader(kind: Any) -> _Read | None:
    """How what was written of this type is read; None where it is what it was."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (one,) = (a for a in inner if a is not type(None))
        read = _reader(one)
        return read and (lambda v: None if v is None else read(v))
    if origin is tuple:
        reads = [_reader(a) for a in inner if a is not Ellipsis]
        if len(inner) == 2 and inner[1] is Ellipsis:
            return _reads_all(tuple, reads[0])
        return lambda v: tuple(x if r is None else r(x) for x, r in zip(v, reads, strict=True))
    if origin is list:
        return _reads_all(list, _reader(inner[0]))
    if origin is Counter:
        return lambda v: Counter(dict(v))
    if origin is dict:
        key, value = (_reader(a) or (lambda v: v) for a in inner)
        return lambda v: {key(k): value(x) for k, x in v}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return _dataclass_reader(kind) if dataclasses.is_dataclass(kind) else None


def _reads_all(of: Callable[[Any], Any], read: _Read | None) -> _Read:
    return of if read is None else lambda v: of(map(read, v))


def _dataclass_reader(kind: Any) -> _Read:
    names, hints = _names(kind), typing.get_type_hints(kind)
    readers = ((at, _reader(hints[name])) for at, name in enumerate(names))
    changed = [(at, change) for at, change in readers if change is not None]

    def read(plain: list[Any]) -> Any:
        for at, change in changed:
            if plain[at] is not None:
                plain[at] = change(plain[at])
        return kind(**dict(zip(names, plain, strict=True)))

    return read
