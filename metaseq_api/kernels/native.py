"""What a CPU runs of our own (`cpu/`, compiled by `compiling`), called with plain addresses.

Where there is no compiler, no AVX-512, or no Linux, there is none of it, and without AMX none in bf16: torch's own
operations serve (`native_for`).

Knows how to call. Does not know blocks or models.

Shapes: T rows, I inputs, O outputs, H heads, D head width, P blocks of the pool, S tokens of a block; of whole layers
E model width, F ffn rows.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
from array import array
from collections.abc import Sequence as Seq
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from metaseq_api.kernels.compiling import SCRATCH, compiled
from metaseq_api.kernels.structs import STORED, Stack, Step
from metaseq_api.machine import has_amx, has_avx512

log = logging.getLogger(__name__)

INPUTS = 32
"""A packed weight's inputs are a multiple of it, and so is the width of a head whose prompts are attended here."""
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Native:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.metaseq_begin.argtypes = []
        self._library.metaseq_pack.argtypes = [_ADDRESS, _ADDRESS, _LONG, _LONG, _INT, _INT]
        self._library.metaseq_pack_wide.argtypes = [_ADDRESS, _ADDRESS, _LONG, _LONG, _INT, _INT]
        self._linear_wide = self._library.metaseq_linear_wide
        self._linear_wide.argtypes = [_ADDRESS, _LONG, _ADDRESS, _INT, *[_ADDRESS] * 3, *[_LONG] * 3, _INT, _INT]
        self._linear_wide.restype = None
        self._linear = self._library.metaseq_linear
        self._linear.argtypes = [_ADDRESS, _LONG, *[_ADDRESS] * 4, _LONG, _LONG, _LONG, _INT, _INT, _INT]
        self._linear.restype = None
        self._norm = self._library.metaseq_norm
        self._norm.argtypes = [*[_ADDRESS] * 4, _LONG, _LONG, ctypes.c_float, _INT, _INT]
        self._norm.restype = None
        self._draw = self._library.metaseq_draw
        self._draw.argtypes = [*[_ADDRESS] * 3, _LONG, _ADDRESS, _LONG, _LONG, _LONG, _INT]
        self._draw.restype = None
        self._rate = self._library.metaseq_rate
        self._rate.argtypes = [*[_ADDRESS] * 4, _LONG, _LONG, _LONG, _LONG, _INT]
        self._rate.restype = None
        self._plan = self._library.metaseq_plan
        self._plan.argtypes = [_ADDRESS, ctypes.POINTER(Step), _ADDRESS, _ADDRESS, _INT]
        self._plan.restype = _LONG
        self._embed = self._library.metaseq_embed
        self._embed.argtypes = [*[_ADDRESS] * 5, _LONG, _LONG, _INT, _INT]
        self._embed.restype = None
        self._attend = self._library.metaseq_attend
        self._attend.argtypes = [ctypes.POINTER(Step), *[_ADDRESS] * 6, _INT]
        self._attend.restype = None
        self._layers = self._library.metaseq_layers
        self._layers.argtypes = [ctypes.POINTER(Stack), _LONG, _LONG, *[_ADDRESS] * 3, _LONG]
        self._layers.restype = _LONG

        self.multiplies_tiles = False  # until the kernel was asked

    def begin(self) -> bool:
        """Ask the kernel for AMX; whether it may be used."""
        self.multiplies_tiles = bool(self._library.metaseq_begin() == 0)
        return self.multiplies_tiles

    def computes(self, dtype: torch.dtype) -> bool:
        """Whether steps in it are computed here."""
        return dtype == torch.float32 or (dtype == torch.bfloat16 and self.multiplies_tiles)

    def takes(self, num_inputs: int, dtype: torch.dtype) -> bool:
        """Whether `linear` has a way for such a weight and rows of `dtype`."""
        return self.computes(dtype) and (dtype == torch.float32 or num_inputs % INPUTS == 0)

    @staticmethod
    def kept_in(stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
        """What a weight is kept in for rows of `dtype`: half the bytes are half the time where weights are read once
        for each token, so for rows in fp32 a half is widened only as it is multiplied. The products are the same."""
        return stored if dtype == torch.float32 and stored in STORED else dtype

    def pack(self, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight in the order in which `linear` reads it for rows of `dtype`, O filled up to whole panels."""
        outputs, inputs = weight_OI.shape
        assert self.takes(inputs, dtype)
        kept = self.kept_in(weight_OI.dtype, dtype)
        rounds = kept == torch.bfloat16 and weight_OI.dtype == torch.float16  # as it is packed
        weight_OI = weight_OI.contiguous() if rounds else weight_OI.to(kept).contiguous()
        panel = 64 if dtype == torch.float32 else 32
        packed = torch.empty(-(-outputs // panel) * panel, inputs, dtype=kept)
        pack = self._library.metaseq_pack_wide if dtype == torch.float32 else self._library.metaseq_pack
        numbers = (outputs, inputs, STORED[weight_OI.dtype], torch.get_num_threads())
        pack(weight_OI.data_ptr(), packed.data_ptr(), *numbers)
        return packed

    def linear(
        self,
        x_TI: Tensor,
        packed: Tensor,
        num_outputs: int,
        bias: Tensor | None,
        residual: Tensor | None = None,
        *,
        relu: bool = False,
        dtype: torch.dtype | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """relu?(x W^T + b) + residual, rounded once at the end, to x's dtype or fp32; into the first rows of `room`
        where it has so many. The weight was packed for rows of x's dtype. Shapes: -> [T, O]."""
        num, inputs = x_TI.shape
        assert self.computes(x_TI.dtype)
        assert packed.dtype == self.kept_in(packed.dtype, x_TI.dtype)
        assert x_TI.stride(1) == 1
        assert inputs == packed.shape[1]
        assert residual is None or residual.is_contiguous()
        if room is not None and len(room) >= num:
            assert room.dtype == (dtype or x_TI.dtype)
            assert room.is_contiguous()
            y_TO = room[:num]
            assert y_TO.shape[1] == num_outputs
        else:
            y_TO = torch.empty(num, num_outputs, dtype=dtype or x_TI.dtype)
        rows = (x_TI.data_ptr(), x_TI.stride(0), packed.data_ptr())
        addresses = (
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            y_TO.data_ptr(),
        )
        threads = torch.get_num_threads()
        if x_TI.dtype == torch.float32:
            self._linear_wide(*rows, STORED[packed.dtype], *addresses, num, inputs, num_outputs, relu, threads)
        else:
            self._linear(*rows, *addresses, num, inputs, num_outputs, relu, y_TO.itemsize, threads)
        return y_TO

    def norm(self, x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm of each row, in fp32, rounded once. Shapes: -> [T, E]."""
        assert x_TE.dtype == weight.dtype == bias.dtype
        assert x_TE.dtype in (torch.bfloat16, torch.float32)
        assert x_TE.is_contiguous()
        y_TE = torch.empty_like(x_TE)
        tensors = (x_TE, weight, bias, y_TE)
        self._norm(*(x.data_ptr() for x in tensors), *x_TE.shape, eps, x_TE.itemsize, torch.get_num_threads())
        return y_TE

    def plan(self, step: Step, words: array[int], *, pieces: bool) -> tuple[Tensor, Tensor]:
        """Set what a step attends to, by the words of its Batch (`Batch.words`); without `pieces` all but its prompts.
        `step` knows its number of tokens and a block's size.

        Gives room for its integers, first the tokens and their positions, to be kept for as long as the step, as are
        the words; and the rows whose logits are wanted. Shapes: -> [7 T + 4 N] of 32 bits, [R] of 64.
        """
        num = step.num_tokens
        room, wanted_T = torch.empty(7 * num + 4 * words[0], dtype=torch.int32), torch.empty(num, dtype=torch.long)
        given = words.buffer_info()[0]
        return room, wanted_T[: self._plan(given, step, room.data_ptr(), wanted_T.data_ptr(), pieces)]

    def embed(self, token_ids_T: Tensor, positions_T: Tensor, table: Tensor, positions: Tensor) -> Tensor:
        """Each token's row of a table, and its position's of another, added. Shapes: [., D], [., D] -> [T, D]."""
        assert token_ids_T.dtype == positions_T.dtype == torch.int32
        assert table.dtype == positions.dtype
        assert table.shape[1] == positions.shape[1]
        num, width = len(token_ids_T), table.shape[1]
        x_TD = torch.empty(num, width, dtype=table.dtype)
        tensors = (token_ids_T, positions_T, table, positions)
        assert all(x.is_contiguous() for x in tensors)
        addresses = (*(x.data_ptr() for x in tensors), x_TD.data_ptr())
        self._embed(*addresses, num, width, table.itemsize, torch.get_num_threads())
        return x_TD

    def attend(self, step: Step, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write a step's keys and values into pools [P, H, S, D], and attend as it says. Shapes: -> [T, H * D]."""
        num, heads, dim = q_THD.shape
        assert q_THD.stride() == k_THD.stride() == v_THD.stride()
        assert q_THD.stride()[1:] == (dim, 1)
        assert keys.shape[1:] == values.shape[1:] == (heads, step.size, dim)
        assert num == step.num_tokens
        out = torch.empty(num, heads * dim, dtype=q_THD.dtype)
        step.stride = q_THD.stride(0)
        tensors = (q_THD, k_THD, v_THD, keys, values, out)
        self._attend(step, *(x.data_ptr() for x in tensors), q_THD.dtype.itemsize)
        return out

    def layers(self, stack: Stack, halves: range, x_TE: Tensor, room: Tensor, wanted_R: Tensor) -> int:
        """Halves of layers, with sums over the stack's ranks after each; x is overwritten. The last layer, once it has
        attended, goes on with the wanted rows alone, which are x's first ones then. The caller has checked what the
        stack's addresses stand for. Gives the next half; negative where the sum before it was said to the other ranks
        and has not been heard from them.

        Shapes: [T, E], at least [T, E + 4 H * D + F], [R].
        """
        step = stack.step.contents
        assert x_TE.is_contiguous()
        assert x_TE.shape == (step.num_tokens, stack.width)
        assert room.is_contiguous()
        assert room.dtype == x_TE.dtype
        assert room.numel() >= step.num_tokens * (stack.width + 4 * step.heads * step.dim + stack.ffn)
        assert wanted_R.dtype == torch.long
        addresses = (x_TE.data_ptr(), room.data_ptr(), wanted_R.data_ptr())
        return int(self._layers(stack, halves.start, halves.stop, *addresses, len(wanted_R)))

    def draw(
        self,
        scores_RV: Tensor,
        choices: Seq[tuple[float, float, int, float, tuple[int, ...]]],
        banned: Seq[int] = (),
    ) -> Tensor:
        """The token that each row's choice comes to, and the row's highest score (NaN where there is one).

        A choice is `choice` of cpu/draw.c: a number in [0, 1) that falls on a token (or -1 for the highest), top_p,
        top_k (0: all), and how far below the highest a score may be, as a number up to 0; and tokens that are not to be
        chosen, as those that are banned for all: these scores are overwritten.
        Shapes: scores [R, V] -> [R, 2] in fp64.
        """
        num, width = scores_RV.shape
        assert len(choices) == num
        assert scores_RV.dtype == torch.float32
        assert scores_RV.stride(1) == 1
        numbers = array("d", chain.from_iterable(choice[:4] for choice in choices))
        closed = array("q")
        for row, choice in enumerate(choices):
            for token_id in (*banned, *choice[4]):
                assert 0 <= token_id < width
                closed.extend((row, token_id))
        drawn_R2 = torch.empty(num, 2, dtype=torch.double)
        given = (numbers.buffer_info()[0], closed.buffer_info()[0], len(closed) // 2, drawn_R2.data_ptr())
        sizes = (scores_RV.stride(0), num, width, torch.get_num_threads())
        self._draw(scores_RV.data_ptr(), *given, *sizes)
        return drawn_R2

    def rate(self, scores_RV: Tensor, rows: Seq[int], chosen_R: Tensor, most: int) -> Tensor:
        """Of each of some rows: its chosen token's log-probability and rank, 1 for the likeliest; then the log-
        probabilities of the `most` likeliest; then these. Shapes: [R, V], N, [R] -> [N, 2 + 2 most] in fp64."""
        width = scores_RV.shape[1]
        assert scores_RV.dtype == torch.float32
        assert scores_RV.stride(1) == 1
        assert chosen_R.dtype == torch.long
        assert chosen_R.is_contiguous()
        assert most <= width
        found = torch.empty(len(rows), 2 + 2 * most, dtype=torch.double)
        at_N = array("q", rows)
        addresses = (scores_RV.data_ptr(), at_N.buffer_info()[0], chosen_R.data_ptr(), found.data_ptr())
        self._rate(*addresses, scores_RV.stride(0), len(rows), width, most, torch.get_num_threads())
        return found


@functools.cache
def native() -> Native | None:
    """The library, compiled if need be; None where this machine cannot have it."""
    if not has_avx512():
        return None
    try:
        path = compiled()
        found = Native(path)
        if path.parent.name.startswith(SCRATCH):  # loaded, it needs its file no more
            shutil.rmtree(path.parent)
    except subprocess.CalledProcessError as e:
        said = (e.stderr or b"").decode(errors="replace").strip().splitlines() or ["it said nothing"]
        log.warning("no kernels of our own on this CPU, torch's serve: %s failed: %s", e.cmd[0], said[-1])
        return None
    except (OSError, subprocess.SubprocessError) as e:
        log.warning("no kernels of our own on this CPU, torch's serve: %s", e)
        return None
    if has_amx() and not found.begin():
        log.warning("no kernels of our own in bf16, torch's serve: the system gives no AMX")
    return found


def native_for(dtype: torch.dtype, device: torch.device) -> Native | None:
    """The library, where steps in `dtype` are computed by it."""
    own = native() if device.type == "cpu" else None
    return own if own is not None and own.computes(dtype) else None
