"""The batch script: golden texts, options that sbatch really has, quoting that nothing takes apart."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from metaseq_api.core.config import OPT_SHAPES
from metaseq_api.errors import SettingsError
from metaseq_api.launch import sbatch
from metaseq_api.launch.plan import lay_out
from metaseq_api.launch.registry import Registry
from metaseq_api.launch.sbatch import TAIL, Script
from metaseq_api.launch.submit import Order

GOLDEN = Path(__file__).with_name("golden")
BY_HAND = Path(__file__).parents[2] / "slurm" / "hosted.sbatch"


def order(**more: object) -> Order:
    fields: dict[str, object] = {
        "name": "opt-175b",
        "layout": lay_out(OPT_SHAPES["opt-175b"], nodes=2, gpus=8),
        "checkpoint": Path("/data/opt/175B"),
        "host": "0.0.0.0",
        "port": 0,
        "key": None,
        "python": "/opt/venv/bin/python",
        "options": {},
        "setup": [],
        "flags": [],
    }
    return Order(**(fields | more))  # type: ignore[arg-type]


ORDERS = {
    "two_nodes": order(options={"partition": "gpu", "time": "2-00:00:00", "requeue": None}),
    "cpu_demo": order(
        name="demo", checkpoint=None, key="", layout=lay_out(OPT_SHAPES["opt-125m"], nodes=1, gpus=0), port=6010
    ),
    "replicas": order(replicas=3, successor=True, options={"time": "4:00:00"}),
    "odd_names": order(
        checkpoint=Path("/data/my models/it's 100%"),
        setup=["module load cuda/12", "source ~/env"],
        options={"comment": 'say "hi" \\ #1', "exclusive": "user", "constraint": "a100&ib"},
        flags=["--dtype", "bf16", "--cors-origins", "https://a.example,*"],
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_script_is_as_agreed(name: str) -> None:
    registry = Registry(Path("/home/me/100% mine/services" if name == "odd_names" else "/home/me/services"))
    assert ORDERS[name].script(registry).render() == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", ORDERS)
def test_the_golden_scripts_are_good_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sbatch")], check=True)


def test_the_file_for_use_by_hand_starts_and_ends_a_service_in_the_same_way() -> None:
    by_hand = 'python3 -m metaseq_api.cli.interactive_hosted "$@"'
    assert BY_HAND.read_text().endswith(TAIL.replace("COMMAND", by_hand))
    exports = [line for line in BY_HAND.read_text().splitlines() if line.startswith(("export SRUN", "export PYTHON"))]
    made = (GOLDEN / "two_nodes.sbatch").read_text()
    assert len(exports) == 2
    assert all(line.partition(" #")[0] in made for line in exports)


def test_a_service_that_is_not_to_come_back_is_not_queued_again() -> None:
    text = order(options={"no-requeue": None, "signal": "B:USR1@600"}).script(Registry(Path("/r"))).render()
    assert "#SBATCH --no-requeue" in text
    assert "#SBATCH --requeue" not in text
    assert [line for line in text.splitlines() if "--signal=B" in line and line.startswith("#")] == [
        "#SBATCH --signal=B:USR1@600"
    ]


@pytest.mark.parametrize("value", ["a\nb", "a\x00b", "\x7f"])
def test_a_value_that_would_break_the_script_is_refused(value: str) -> None:
    script = Script(name="a", nodes=1, gpus=0, output="x", registry="/r", command=["true"], options={"comment": value})
    with pytest.raises(SettingsError, match="--comment holds a line break or another control character"):
        script.render()


def test_no_option_is_both_passed_on_and_ours() -> None:
    passed = [*sbatch.VALUED, *sbatch.OPTIONAL, *sbatch.BARE]
    assert len(passed) == len(set(passed))
    assert not set(passed) & set(sbatch.OURS)
    assert set(sbatch.SHORT) <= set(passed)
