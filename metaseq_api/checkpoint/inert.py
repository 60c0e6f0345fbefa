"""What a checkpoint says besides its tensors, as numbers, texts and containers, or as data that can be written again.

Knows the classes that metaseq's files name (Namespace, omegaconf's nodes, numpy's scalars and arrays) by what
`unpickle` remembers of them. Does not import one of them for the file's sake, or call anything from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from metaseq_api.checkpoint.unpickle import StoredTensor, Stub

MAX_DEPTH = 100
NAMESPACE = "argparse.Namespace"


class Inert:
    """Turns what `read_pickle` made into data without Stubs: numbers, texts, containers.

    namespace: what an argparse.Namespace's attributes become. tensor: what a StoredTensor becomes. What has no plain
    form becomes None and is listed in `lost`.
    """

    def __init__(
        self,
        namespace: Callable[..., Any] = dict,
        tensor: Callable[[StoredTensor], Any] = lambda stored: stored,
    ) -> None:
        self.lost: list[str] = []
        self._namespace, self._tensor = namespace, tensor
        self._done: dict[int, Any] = {}

    def __call__(self, value: Any, where: str = "", depth: int = 0) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Size, torch.dtype)):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if depth > MAX_DEPTH:
            raise ValueError(f"its pickle nests deeper than {MAX_DEPTH} levels at {where[:80]}")
        self._done[id(value)] = None  # what contains itself is cut here
        self._done[id(value)] = out = self._convert(value, where, depth + 1)
        return out

    def _convert(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, dict):
            return type(value)((key, self(item, f"{where}.{key}", depth)) for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(self(item, f"{where}[{i}]", depth) for i, item in enumerate(value))
        if isinstance(value, (set, frozenset)):
            return type(value)(value)
        if isinstance(value, Stub):
            return self._stub(value, where, depth)
        self.lost.append(f"{where.lstrip('.')} ({value})")
        return None

    def _stub(self, stub: Stub, where: str, depth: int) -> Any:
        name, state = str(stub.type), stub.state
        if name == NAMESPACE and isinstance(state, dict):
            attributes = {k: v for k, v in self(state, where, depth).items() if isinstance(k, str)}
            return self._namespace(**attributes)
        if name.startswith("omegaconf.") and isinstance(state, dict):
            return self(state.get("_content", state.get("_val")), where, depth)
        if stub.type.module.startswith("numpy"):
            number = _numpy(stub)
            if number is not None:
                return number
        elif stub.items or name == "collections.defaultdict":
            return self(stub.items, where, depth)
        elif stub.values:
            return self(stub.values, where, depth)
        elif state is None and len(stub.args) == 1 and isinstance(stub.args[0], (str, int, list)):
            return self(stub.args[0], where, depth)  # a set, a path or a member of an enum
        self.lost.append(f"{where.lstrip('.')} ({name})")
        return None


def _numpy(stub: Stub) -> Any:
    """A number or a list of numbers out of numpy's scalar or array; None for what is neither."""

    def dtype(kind: Any) -> np.dtype[Any] | None:
        if not (isinstance(kind, Stub) and kind.args and isinstance(kind.args[0], str)):
            return None
        known = kind.args[0] in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
        big = isinstance(kind.state, tuple) and len(kind.state) > 1 and kind.state[1] == ">"
        return np.dtype((">" if big else "<") + kind.args[0]) if known else None

    if stub.type.name == "scalar" and len(stub.args) == 2:
        kind, data = dtype(stub.args[0]), stub.args[1]
        if kind is not None and isinstance(data, bytes) and len(data) == kind.itemsize:
            return np.frombuffer(data, kind).item()
    if stub.type.name == "_reconstruct" and isinstance(stub.state, tuple) and len(stub.state) == 5:
        _, shape, kind_stub, fortran, data = stub.state
        kind = dtype(kind_stub)
        if kind is not None and isinstance(data, bytes) and isinstance(shape, tuple) and not fortran:
            flat = np.frombuffer(data[: len(data) // kind.itemsize * kind.itemsize], kind)
            return flat.reshape(shape).tolist() if flat.size == np.prod(shape) else None
    return None


def plain(value: Any) -> Any:
    """Make dicts, lists, numbers and texts, for looking things up; what has no such form is None."""
    return Inert()(value)


def writable(value: Any, tensor: Callable[[StoredTensor], Any]) -> tuple[Any, list[str]]:
    """Make data that torch.save writes, with real Namespaces in it, and list what had to be left out."""
    inert = Inert(argparse.Namespace, tensor)
    return inert(value), inert.lost
