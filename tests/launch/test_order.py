"""The order a supervisor gives, and the last words a rank leaves."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest

from metaseq_api.errors import CheckpointCorrupt
from metaseq_api.launch.order import (
    Order,
    read_last_words,
    settings_from_dict,
    settings_to_dict,
    write_last_words,
)
from metaseq_api.launch.rendezvous import RankInfo
from metaseq_api.launch.terms import Terms
from metaseq_api.settings import Settings

FULL = Settings(checkpoint=Path("a b"), bpe_vocab=Path("v"), bpe_merges=None, host="::1", threads=3, timeout_s=1.5)


@pytest.mark.parametrize("settings", [Settings(), FULL])
def test_settings_survive_json_with_their_types(settings: Settings) -> None:
    back = settings_from_dict(settings_to_dict(settings))
    assert back == settings
    assert all(type(getattr(back, f.name)) is type(getattr(settings, f.name)) for f in dataclasses.fields(Settings))


def test_an_order_survives_json() -> None:
    rank = RankInfo(rank=1, world_size=2, local_rank=1, local_world_size=2, node="n", init="file:///tmp/x/store")
    order = Order(
        settings=FULL, rank=rank, terms=Terms(end_time=1.5), listen_fd=None, words_fd=3, parent_pid=9, verbose=True
    )
    assert Order.from_json(order.to_json()) == order


def test_last_words_are_one_line_that_comes_back() -> None:
    with tempfile.TemporaryFile() as file:
        write_last_words(file.fileno(), CheckpointCorrupt("naïve.pt is cut short"))
        assert read_last_words(file.fileno()) == "naïve.pt is cut short"


@pytest.mark.parametrize("text", ["", '{"mess', "{}"])
def test_words_never_spoken_or_broken_off_are_none(text: str) -> None:
    with tempfile.TemporaryFile() as file:
        os.pwrite(file.fileno(), text.encode(), 0)
        assert read_last_words(file.fileno()) is None
