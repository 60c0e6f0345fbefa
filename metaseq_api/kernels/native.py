"""What a CPU runs of our own (`cpu/`), compiled on the machine that runs it, once, and called with plain addresses.

Where there is no compiler, no AMX, or no Linux, there is none of it, and torch's own operations serve (`native`). The
library lies in the user's cache folder, named by source, compiler and processor, so that a second start finds it.

Knows how to compile and how to call. Does not know layers, blocks or models.

Shapes: T rows, I inputs, O outputs, H heads, D head width, P blocks of the pool, S tokens of a block.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
from array import array
from collections.abc import Sequence as Seq
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
# sums in another order, no more: -ffast-math would have every thread of the process take denormal numbers for 0
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
FLAGS = ("-O3", "-march=native", *_MATH, "-pthread", "-fPIC", "-shared")
COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60.0
SCRATCH = "metaseq-api-native-"
INPUTS = 32
"""A packed weight's inputs are a multiple of it, and so is the width of a head whose prompts are attended here."""
_ADDRESS, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Step(ctypes.Structure):
    """`step` of cpu/attention.c: where a step's tokens go, and what they attend to, as addresses of 32-bit integers."""

    _fields_ = (
        *((name, _ADDRESS) for name in ("block_T", "offset_T", "row_B", "context_B", "table_BN")),
        *((name, _ADDRESS) for name in ("begin_P", "end_P", "start_P", "table_PN")),
        *(
            (name, _LONG)
            for name in ("num_tokens", "num_single", "num_pieces", "width", "heads", "dim", "size", "stride")
        ),
        ("scale", ctypes.c_float),
        ("threads", _INT),
    )


class Native:
    """The compiled library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.metaseq_begin.argtypes = []
        self._library.metaseq_pack.argtypes = [_ADDRESS, _ADDRESS, _LONG, _LONG, _INT]
        self._library.metaseq_pack_wide.argtypes = self._library.metaseq_pack.argtypes
        self._linear_wide = self._library.metaseq_linear_wide
        self._linear_wide.argtypes = [_ADDRESS, _LONG, *[_ADDRESS] * 4, _LONG, _LONG, _LONG, _INT, _INT]
        self._linear_wide.restype = None
        self._linear = self._library.metaseq_linear
        self._linear.argtypes = [_ADDRESS, _LONG, *[_ADDRESS] * 4, _LONG, _LONG, _LONG, _INT, _INT, _INT]
        self._linear.restype = None
        self._norm = self._library.metaseq_norm
        self._norm.argtypes = [*[_ADDRESS] * 4, _LONG, _LONG, ctypes.c_float, _INT, _INT]
        self._norm.restype = None
        self._draw = self._library.metaseq_draw
        self._draw.argtypes = [*[_ADDRESS] * 4, _LONG, _LONG, _LONG, _INT]
        self._draw.restype = None
        self._rate = self._library.metaseq_rate
        self._rate.argtypes = [*[_ADDRESS] * 4, _LONG, _LONG, _LONG, _LONG, _INT]
        self._rate.restype = None
        self._attend = self._library.metaseq_attend
        self._attend.argtypes = [ctypes.POINTER(Step), *[_ADDRESS] * 6, _INT]
        self._attend.restype = None

    def begin(self) -> bool:
        """Ask the kernel for AMX; whether it may be used."""
        return bool(self._library.metaseq_begin() == 0)

    def takes(self, weight_OI: Tensor) -> bool:
        """Whether `linear` has a way for such a weight."""
        return weight_OI.dtype == torch.float32 or (
            weight_OI.dtype == torch.bfloat16 and weight_OI.shape[1] % INPUTS == 0
        )

    def pack(self, weight_OI: Tensor) -> Tensor:
        """A weight in the order in which `linear` reads it, O filled up to whole panels."""
        outputs, inputs = weight_OI.shape
        assert self.takes(weight_OI)
        assert weight_OI.is_contiguous()
        narrow = weight_OI.dtype == torch.bfloat16
        panel = 32 if narrow else 64
        packed = torch.empty(-(-outputs // panel) * panel, inputs, dtype=weight_OI.dtype)
        pack = self._library.metaseq_pack if narrow else self._library.metaseq_pack_wide
        pack(weight_OI.data_ptr(), packed.data_ptr(), outputs, inputs, torch.get_num_threads())
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
        """relu?(x W^T + b) + residual, rounded once at the end, to the weight's dtype or fp32; into the first rows of
        `room` where it has so many. Shapes: -> [T, O]."""
        num, inputs = x_TI.shape
        assert x_TI.dtype == packed.dtype
        assert x_TI.stride(1) == 1
        assert inputs == packed.shape[1]
        assert residual is None or residual.is_contiguous()
        if room is not None and len(room) >= num:
            assert room.dtype == (dtype or packed.dtype)
            assert room.is_contiguous()
            y_TO = room[:num]
            assert y_TO.shape[1] == num_outputs
        else:
            y_TO = torch.empty(num, num_outputs, dtype=dtype or packed.dtype)
        addresses = (
            x_TI.data_ptr(),
            x_TI.stride(0),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            y_TO.data_ptr(),
        )
        threads = torch.get_num_threads()
        if packed.dtype == torch.float32:
            self._linear_wide(*addresses, num, inputs, num_outputs, relu, threads)
        else:
            self._linear(*addresses, num, inputs, num_outputs, relu, y_TO.itemsize, threads)
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

    def draw(self, scores_RV: Tensor, choices: Seq[tuple[float, float, int, float]]) -> tuple[Tensor, Tensor]:
        """Each row's highest score (NaN where there is one), and the token that its choice comes to.

        A choice is `choice` of cpu/draw.c: a number in [0, 1) that falls on a token (or -1 for the highest), top_p,
        top_k (0: all), and how far below the highest a score may be, as a number up to 0.
        Shapes: scores [R, V] -> [R], [R] of 64-bit integers.
        """
        num, width = scores_RV.shape
        assert len(choices) == num
        assert scores_RV.dtype == torch.float32
        assert scores_RV.stride(1) == 1
        best_R, chosen_R = torch.empty(num), torch.empty(num, dtype=torch.long)
        choices_R4 = array("d", chain.from_iterable(choices))
        tensors = (best_R.data_ptr(), chosen_R.data_ptr(), scores_RV.stride(0))
        self._draw(scores_RV.data_ptr(), choices_R4.buffer_info()[0], *tensors, num, width, torch.get_num_threads())
        return best_R, chosen_R

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
    if not torch.cpu._is_amx_tile_supported():
        return None
    try:
        path = _compiled()
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
    if not found.begin():
        log.warning("no kernels of our own on this CPU, torch's serve: the system gives no AMX")
        return None
    return found


def _compiled() -> Path:
    """The library's path. Raises: OSError, SubprocessError."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (gcc or clang) on the PATH")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=PATIENCE_S).stdout
    sources = sorted(SOURCES.glob("*.[ch]"))
    about = (*(path.read_bytes() for path in sources), " ".join(FLAGS).encode(), version, _processor())
    path = _folder() / f"native-{hashlib.sha256(b'/'.join(about)).hexdigest()[:16]}.so"
    if not path.exists():
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:  # ranks that start together do it each
            made = Path(scratch, path.name)
            given = [str(p) for p in sources if p.suffix == ".c"]
            command = [compiler, *FLAGS, "-o", str(made), *given]
            subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S)
            with made.open("rb") as whole:
                os.fsync(whole.fileno())
            with contextlib.suppress(FileExistsError):  # who is second leaves the first one's: it may be in use
                os.link(made, path)
        log.info("compiled kernels for this CPU in %.1f s", time.monotonic() - began)
    return path


def _folder() -> Path:
    """Where libraries are kept: the user's, or where that cannot be written, this process's alone."""
    try:
        folder = Path.home() / ".cache" / "metaseq-api"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK) and all(_is_ours(place) for place in (folder, folder.parent)):
            return folder
    except (OSError, RuntimeError) as e:
        log.info("no cache folder: %s", e)
    return Path(tempfile.mkdtemp(prefix=SCRATCH))


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a file there: what lies in it is run."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> bytes:
    """What this machine's first processor can do."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return next((line for line in lines if line.startswith(b"flags")), b"")
