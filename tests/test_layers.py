"""The house's rules, read from the source: imports point down, and broad excepts are where they may be."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOW = {"errors", "settings", "log", "progress", "machine", "flags"}
TENSOR = {"torch", "numpy"}
# part of the library -> (parts it may import, third parties it may import)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "flags": ({"errors"}, set()),
    "log": (set(), set()),
    "machine": (set(), set()),
    "progress": (set(), {"tqdm"}),
    "settings": ({"errors"}, set()),
    "core": ({"errors"}, set()),
    "scheduling": ({"errors", "core"}, set()),
    "tokenizer": ({"errors", "core"}, {"tokenizers"}),
    "kernels": ({"machine"}, TENSOR | {"triton"}),
    "parallel": (LOW | {"core", "kernels"}, TENSOR),
    "checkpoint": (LOW | {"core"}, TENSOR | {"fairscale", "isal"}),
    "model": (LOW | {"core", "parallel", "kernels"}, TENSOR),
    "engine": (LOW | {"core", "scheduling", "tokenizer", "parallel", "model"}, {"torch"}),
    "server": (LOW | {"core"}, {"flask", "waitress", "werkzeug", "jinja2", "prometheus_client"}),
    "bench": (
        LOW
        | {"core", "checkpoint", "scheduling", "tokenizer", "parallel", "model", "engine", "launch"}
        | {"kernels", "rank", "host", "resident"},
        {"torch", "transformers"},
    ),
    "launch": (LOW | {"core"}, set()),
    "download": (LOW | {"core"}, set()),
    "demo": (set(), set()),
    "front": (LOW | {"core", "launch", "server", "tokenizer"}, set()),
    "client": ({"errors"}, set()),
    "asking": (LOW | {"client", "local"}, set()),
    "__init__": ({"core", "llm", "machine"}, set()),
}
# what puts a rank, a model or a door's model together may know everything but the tops above itself
TOPS = {"rank": set(), "host": {"rank"}, "resident": {"host", "rank"}, "llm": {"resident"}, "local": {"resident"}}
TOP_MAY = set(RULES) - {"__init__", "asking", "client", "front"}
DOOR_THIRD = TENSOR | {"tokenizers", "tqdm", "transformers"}
FAIRSCALE_ONLY_IN = {"metaseq_api/checkpoint/trainer.py"}
# where a broad except is the rim that turns anything into one answer, one line or one exit code
BROAD_EXCEPTS = {
    "metaseq_api/engine/engine.py",  # the batching thread
    "metaseq_api/launch/child.py",  # a rank
    "metaseq_api/server/later.py",  # a view whose answer was put off
    "metaseq_api/resident.py",  # the thread of an engine in a caller's process
    "metaseq_api/settings.py",  # an operator's constants.py, which is a program
}
ENVIRON_ONLY_IN = {
    "metaseq_api/launch/probe.py",  # a process of its own, on a node
    "metaseq_api/bench/contender.py",  # and another, to leave word for a rival's OpenMP
    "metaseq_api/settings.py",
    "metaseq_api/machine.py",  # to leave word for OpenMP
    "metaseq_api/launch/rendezvous.py",
    "cli/interactive_hosted.py",
    "slurm/manage.py",
}


def sources() -> list[Path]:
    return [p for d in ("metaseq_api", "cli", "scripts", "slurm") for p in sorted((ROOT / d).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def split(names: set[str]) -> tuple[set[str], set[str]]:
    """Parts of the library, and third parties."""
    ours = {n.split(".")[1] for n in names if n.startswith("metaseq_api.")}
    third = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"metaseq_api"}
    return ours, third


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(ROOT)
    ours, third = split(imports(path))
    if relative.parts[0] != "metaseq_api":
        assert not ours & {"cli", "scripts", "slurm"}, "a door is a leaf"
        assert third <= DOOR_THIRD
        return
    part = relative.parts[1].removesuffix(".py")
    if part in TOPS:
        assert ours - {"__version__"} <= TOP_MAY | TOPS[part] | {part}
        assert third <= TENSOR
        return
    may, third_may = RULES[part]
    assert ours - {"__version__"} <= may | {part}, f"{relative} imports {sorted(ours - may - {part})}"
    assert third <= third_may, f"{relative} imports {sorted(third - third_may)}"
    assert "fairscale" not in third or str(relative) in FAIRSCALE_ONLY_IN


def test_broad_excepts_are_where_they_may_be() -> None:
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "everything"
                assert "BaseException" not in names or any(isinstance(n, ast.Raise) for n in ast.walk(node)), path
                assert names != "everything", path
                assert not all(isinstance(n, ast.Pass) for n in node.body), f"{path}: except: pass"
                if re.search(r"\bException\b", names):
                    found.add(str(path.relative_to(ROOT)))
    assert found == BROAD_EXCEPTS


def test_the_environment_is_read_where_it_may_be() -> None:
    readers = {str(p.relative_to(ROOT)) for p in sources() if "os.environ" in p.read_text("utf-8")}
    assert readers <= ENVIRON_ONLY_IN


def test_nothing_in_the_library_prints_or_keeps_global_state() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not isinstance(node, ast.Global), f"{path}: global {node.names}"
