"""A report of files that hold anything: odd numbers, text where numbers belong, bytes that are no
text. It is a page, or one line."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from launch.report import main
from tests.unit.report.test_report import _benchmark, _write, shards  # noqa: F401 - a fixture

FILES = ("metrics.jsonl", "result.json", "environment.json", "config.yaml", "benchmark.json")
ODD = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-0.0",
    "1e308",
    "5e-324",
    "9" * 400,
    "-" + "9" * 30,
    "0",
    "-1",
    "1e18",
    "1e17",
    "true",
]
ODD += [
    '"text"',
    '""',
    '"\\ud800"',
    '"\\u0000\\u001b[2J"',
    "null",
    "[]",
    "{}",
    "[1]",
    '{"a": {}}',
    "[" * 30 + "]" * 30,
    '"NaN"',
    "1e-300",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards) -> Path:  # noqa: F811
    folder = _write(tmp_path_factory.mktemp("runs") / "run", shards)
    _benchmark(folder)
    return folder


def _report(run: Path, *more: Path) -> str | None:
    """The page; None where the files were refused with one line."""
    out = run / "report.html"
    out.unlink(missing_ok=True)
    try:
        main([str(run), *map(str, more), "--users", "0"])
    except ValueError as error:
        if "\n" in str(error) or "is no benchmark.json" not in str(error):
            raise
        return None
    page = out.read_text()
    assert page.endswith("</html>\n")
    for word in (">nan", "nan<", ">inf", "inf<", '="nan', '="inf', "nan,", "inf,"):
        assert word not in page, f"{word} in {page[max(0, page.find(word) - 80) :][:160]}"
    return page


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value inside."""
    found = [path] if path else []
    for name, inner in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        found += _places(inner, (*path, name))
    return found


def _spoilt(text: str, place: tuple, odd: str) -> str:
    value = json.loads(text)
    inner = value
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = "<odd>"
    return json.dumps(value).replace('"<odd>"', odd)


@pytest.mark.slow
def test_every_value_may_be_odd(run):
    """Each value of each file once, with an odd one in its place."""
    chance = random.Random(0)
    pages = 0
    for name in FILES:
        path = run / name
        before = path.read_text()
        head, text = before, ""
        if name == "metrics.jsonl":
            rows = before.splitlines()
            head, text = "\n".join([rows[0], *rows[9:12]]), "\n" + "\n".join(rows[12:])
        for part in head.splitlines() if name == "metrics.jsonl" else [head]:
            for place in _places(json.loads(part)):
                odd = chance.choice(ODD)
                path.write_text(
                    before.replace(part, _spoilt(part, place, odd), 1)
                    if text
                    else _spoilt(part, place, odd)
                )
                pages += _report(run) is not None
        path.write_text(before)
    assert pages > 100


def test_a_section_may_stand_where_a_value_belongs(run):
    path = run / "config.yaml"
    before = path.read_text()
    config = json.loads(before)
    path.write_text(json.dumps(config | {"device": {"a": {}}}))
    try:
        assert _report(run) is not None
    finally:
        path.write_text(before)


@pytest.mark.parametrize("odd", ODD)
def test_every_number_may_be_the_same_odd_one(run, odd):
    for name in FILES:
        path = run / name
        before = path.read_text()
        lines = before.splitlines() if name == "metrics.jsonl" else [before]
        path.write_text("\n".join(_all_odd(line, odd) for line in lines) + "\n")
        _report(run)
        path.write_text(before)


def _all_odd(text: str, odd: str) -> str:
    def spoil(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return (
            "<odd>" if isinstance(value, int | float) and name not in ("step", "epoch") else value
        )

    try:
        return json.dumps(spoil(json.loads(text))).replace('"<odd>"', odd)
    except ValueError:
        return text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"9" * 5000,
        b"a: &a [*a]",
        "Ã¼\u2028".encode("latin-1", "replace"),
    ],
)
def test_a_file_that_is_something_else(run, name, data):
    path = run / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        page = _report(run)
        assert page is not None or name == "benchmark.json"
        if name == "result.json" and page:
            assert "result.json cannot be read" in page
    finally:
        path.write_bytes(before)


def test_a_file_that_repeats_itself_without_end(run):
    path = run / "config.yaml"
    before = path.read_text()
    names = "abcdefghijklmnopqrst"
    path.write_text(
        "model: &a [1, 2]\n"
        + "".join(
            f"{n}: &{n} [{', '.join(['*' + m] * 10)}]\n" for m, n in itertools.pairwise(names)
        )
    )
    try:
        assert _report(run) is not None
    finally:
        path.write_text(before)
