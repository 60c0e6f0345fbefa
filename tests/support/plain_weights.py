"""Weights as they lie on a GPU, where one row is not multiplied by torch: a CPU packs them by itself."""

from __future__ import annotations

import pytest


def lie_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have linear layers that are loaded from now on keep their weights as torch has them."""
    monkeypatch.setattr("metaseq_api.parallel.layers.native_for", lambda *_: None)
    monkeypatch.setattr("metaseq_api.parallel.layers._packs", lambda *_: False)
