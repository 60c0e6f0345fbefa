"""Where a start went: laps without a gap, from the command on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metaseq_api.launch.startup import StartUp, boot_clock, process_began


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_laps_add_up_to_the_whole_and_short_ones_are_not_named() -> None:
    clock = Clock()
    startup = StartUp(began=98.0, clock=clock)
    startup.lap("imports")
    clock.wait(0.01)
    startup.lap("meeting")
    clock.wait(1.5)
    startup.lap("packing")
    assert startup.told() == "3.5 s: imports 2.0, packing 1.5"
    assert sum(startup.laps.values()) == pytest.approx(startup.total)


def test_what_is_read_in_pieces_is_one_lap_and_what_lies_between_another() -> None:
    clock = Clock()
    startup = StartUp(began=100.0, clock=clock)
    for _ in range(3):
        clock.wait(0.5)
        with startup.inside("reading", around="packing"):
            clock.wait(1.0)
    assert startup.laps == {"packing": 1.5, "reading": 3.0}


def test_a_process_began_when_it_was_started() -> None:
    before = boot_clock()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        began = process_began(child.pid)
    assert before - 0.02 <= began <= boot_clock()  # the kernel counts in hundredths


def test_a_supervised_rank_counts_from_its_supervisor_on() -> None:
    startup = StartUp.of_this_process(supervised=True)
    assert list(startup.laps) == ["door", "imports"]
    assert startup.laps["door"] == pytest.approx(process_began(os.getpid()) - process_began(os.getppid()))


def test_where_nothing_can_be_read_a_process_began_now(tmp_path: Path) -> None:
    assert process_began(1, proc=tmp_path) == pytest.approx(boot_clock(), abs=5)
