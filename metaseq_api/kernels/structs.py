"""What the compiled library is given, field by field as C has it. Addresses, whose owners must outlive them.

Shapes: T tokens of a step, B generated ones, P pieces of prompts, S tokens of a block.
"""

from __future__ import annotations

import ctypes

import torch

_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_LEAVES = (("weight", _ADDRESS), ("bias", _ADDRESS), ("stored", _LONG))
STORED = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""How cpu/wide.h numbers what a weight may be stored in that is multiplied in fp32."""


class Step(ctypes.Structure):
    """`step` of cpu/step.h: where a step's tokens go, and what they attend to, as addresses of 32-bit integers."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("words", "block_T", "offset_T")),
        *((name, _ADDRESS) for name in ("row_B", "context_B", "table_B")),
        *((name, _ADDRESS) for name in ("begin_P", "end_P", "start_P", "table_P")),
        *((name, _LONG) for name in ("num_tokens", "num_single", "num_pieces", "heads", "dim", "size", "stride")),
        ("scale", ctypes.c_float),
        ("threads", _INT),
    )


class Layer(ctypes.Structure):
    """`layer` of cpu/layers.c: of each part the addresses, or null, of a weight (packed, of a linear layer) and its
    bias, and how the weight is stored (`STORED`)."""

    PARTS = ("before", "qkv", "out", "middle", "fc1", "fc2")
    _fields_ = (
        *((f"{part}_{leaf}", kind) for part in PARTS for leaf, kind in _LEAVES),
        ("keys", _ADDRESS),
        ("values", _ADDRESS),
    )


class Ranks(ctypes.Structure):
    """`ranks` of cpu/ranks.h: the memory that this machine's ranks sum through (`parallel.shared`)."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("words", "slots")),
        ("count", ctypes.c_uint64),
        ("slot", _LONG),
        *((name, _INT) for name in ("rank", "num_ranks", "looks")),
    )


class Stack(ctypes.Structure):
    """`stack` of cpu/layers.c: what all halves of all layers have in common."""

    _fields_ = (
        ("step", ctypes.POINTER(Step)),
        ("ranks", ctypes.POINTER(Ranks)),
        ("layers", ctypes.POINTER(Layer)),
        *((name, _LONG) for name in ("num_layers", "width", "ffn")),
        ("eps", ctypes.c_float),
        *((name, _INT) for name in ("pre_norm", "residual", "bytes")),
    )
