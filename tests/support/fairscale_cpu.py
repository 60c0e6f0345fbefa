"""Lets fairscale's FSDP train on a CPU over gloo: a stand-in for the CUDA streams that only its one module sees."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import torch


class _Stream:
    """On a CPU everything happens in order already, so waiting for nothing is what a stream means there."""

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


class _Cuda:
    _stream = _Stream()

    def Stream(self) -> _Stream:
        return self._stream

    def current_stream(self) -> _Stream:
        return self._stream

    def is_available(self) -> bool:
        return True  # or FSDP leaves its table of streams empty

    def synchronize(self) -> None: ...

    def stream(self, stream: _Stream) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    cuda = _Cuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install() -> None:
    """Make FSDP usable in this process. For processes of a test's own: it cannot be undone."""
    import fairscale.nn.data_parallel.fully_sharded_data_parallel as module

    if isinstance(module.torch, _Torch):
        return
    module.torch = _Torch("torch")
    real = torch.Tensor.record_stream

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if not isinstance(stream, _Stream):
            real(self, stream)

    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign, assignment]
