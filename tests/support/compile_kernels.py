"""Compile the Triton kernels for a Hopper GPU, which need not be there: a line of JSON for each.

Pointers and strides are taken as multiples of 16, as torch gives them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metaseq_api.kernels import add_norm, decode_attention, row_linear

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ANYWHERE = {"rows_ptr": "*i32", "tables_ptr": "*i32", "contexts_ptr": "*i32", "table_width": "i32"}


def compiled(kernel: object, dtype: str, constants: dict[str, object], warps: int = 4) -> dict[str, object]:
    """Registers and local memory of a thread, and how many of the loads read 16 bytes at once."""
    names = kernel.arg_names  # type: ignore[attr-defined]
    kinds = {
        name: "constexpr"
        if name in constants
        else ANYWHERE.get(name)
        or ("*fp32" if name in ("parts_ptr", "stats_ptr") else f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
    }
    kinds |= {name: "fp32" for name in ("scale", "eps") if name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in ANYWHERE | constants}
    aligned = {at: what for at, what in aligned.items() if names[at[0]] not in ("heads", "scale", "eps")}
    where = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=where, attrs=aligned)
    options = {"num_warps": warps, "launch_pdl": constants["EARLY"]}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name.lower(): int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL")}
    wide = len(re.findall(r"ld\.global[^;]*\.v4", done.asm["ptx"]))
    waits = done.asm["ptx"].count("griddepcontrol.wait")
    before = done.asm["ptx"].partition("griddepcontrol.wait")[0].count("ld.global") if waits else 0
    about = {"name": f"{names[0]} {dtype} {constants}", "early": constants["EARLY"]}
    return about | {"wide": wide, "waits": waits, "before": before, **numbers}


def main() -> None:
    for dtype, early in (("bf16", False), ("fp32", False), ("bf16", True)):
        for width, padded in ((64, 64), (80, 128), (128, 128)):
            tile = decode_attention.TILE_BYTES // padded // (4 if dtype == "fp32" else 2)
            constants = {"SIZE": 32, "WIDTH": width, "W": padded, "TILE": tile, "SPLITS": 16, "EARLY": early}
            print(json.dumps(compiled(decode_attention._attend_part, dtype, constants)))
        join = {"WIDTH": 64, "W": 64, "SPLITS": 16, "EARLY": early}
        print(json.dumps(compiled(decode_attention._join_parts, dtype, join)))
        sizes = {"OUTPUTS": row_linear.OUTPUTS, "INPUTS": row_linear.INPUTS}
        for whole in (1, 8192, 16384):  # 1: no norm
            norm, warps = whole > 1, max(row_linear.WARPS, whole // row_linear.NORMED)
            constants = {"NORM": norm, "BIAS": True, "RESIDUAL": not norm, "RELU": norm, "EARLY": early, "WHOLE": whole}
            print(json.dumps(compiled(row_linear._row_linear, dtype, constants | sizes, warps)))
        constants = {"EARLY": early, "WHOLE": 8192}
        print(json.dumps(compiled(add_norm._add_norm, dtype, constants, 8192 // add_norm.NUMBERS)))


if __name__ == "__main__":
    main()
