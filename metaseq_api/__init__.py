"""Serve OPT-family checkpoints over HTTP, straight from the FSDP shards a trainer left behind.

In Python: `from metaseq_api import LLM, SamplingParams`. Both are loaded when they are asked for, and torch with LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metaseq_api.machine import let_threads_rest, take_large_pages

if TYPE_CHECKING:
    from metaseq_api.core import SamplingParams
    from metaseq_api.llm import LLM

__all__ = ["LLM", "SamplingParams", "__version__"]

__version__ = "0.1.0"

let_threads_rest()
take_large_pages()


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from metaseq_api.llm import LLM

        return LLM
    if name == "SamplingParams":
        from metaseq_api.core import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
