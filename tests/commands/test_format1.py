"""Runs, exports and ensembles that wrote checkpoint format 1 give the lists that they gave then."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.format1 import FIXTURES, KINDS, copy_of_fixtures, observe, observe_ensemble


def assert_alike(found: Any, expected: Any, where: str = "") -> None:
    """The same ids and names, and floats within the rounding of another processor's sums."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_alike(found[name], expected[name], f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_alike(found[i], value, f"{where}/{i}")
    else:
        assert found == expected, where


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_format_1(kind, tmp_path):
    """Evaluate, recommend, serve, export, resume by a step, and start another run from it."""
    expected = json.loads((FIXTURES / kind / "expected.json").read_text())
    with copy_of_fixtures(tmp_path / "copy"):
        assert_alike(observe(kind), expected)


def test_an_ensemble_of_format_1(tmp_path):
    expected = json.loads((FIXTURES / "ensemble" / "expected.json").read_text())
    with copy_of_fixtures(tmp_path / "copy"):
        assert_alike(observe_ensemble(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fixtures_are_of_format_1(kind):
    files = sorted(FIXTURES.glob(f"{kind}/run/checkpoints/*/checkpoint.json"))
    assert files
    for file in [*files, FIXTURES / kind / "export" / "export.json"]:
        assert json.loads(file.read_text())["format_version"] == 1, file
