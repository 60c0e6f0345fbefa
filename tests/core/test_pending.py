"""An answer that one thread fills and another waits for."""

from __future__ import annotations

import pytest

from metaseq_api.core.pending import PendingAnswer


def test_one_that_has_ended_is_there_though_those_who_wait_were_not_woken_yet() -> None:
    answer = PendingAnswer()
    with pytest.raises(TimeoutError):
        answer.result(0)
    answer.ended = True  # where the thread that ends it stands still for a moment
    assert answer.result(0) == []
    assert answer.take() == []
