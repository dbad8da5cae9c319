"""What is said of long work."""

from __future__ import annotations

import threading

import pytest

from dist_vasp import progress
from dist_vasp.progress import Waiting


@pytest.mark.parametrize(
    ("estimate", "text"),
    [(0.0, "building"), (30.0, "building, about 30 s left"), (1.0, "building, about 1 s left")],
)
def test_long_work_is_announced_once_with_an_estimate(estimate, text, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_TO_WAIT_SILENTLY", 0.01)
    lines, announced = [], threading.Event()
    monkeypatch.setattr(progress, "say", lambda line: (lines.append(line), announced.set()))
    with Waiting("building", True, estimate) as work:
        assert announced.wait(60)
    assert work.seconds >= 0.01
    assert lines == [text]


def test_short_work_and_other_ranks_say_nothing(monkeypatch, capsys):
    with Waiting("building", True):
        pass
    monkeypatch.setattr(progress, "_SECONDS_TO_WAIT_SILENTLY", 0.0)
    before = threading.active_count()
    with Waiting("building", False):
        assert threading.active_count() == before
    assert capsys.readouterr().out == ""
