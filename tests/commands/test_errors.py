"""Wrong invocations of every command, as docs/errors.md lists them: one line, status 2, nothing
written (DESIGN.md, section 7)."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.support.invoke import Commands
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "errors.md"


def rows() -> list[tuple[str, str]]:
    """(line, message) of the page's tables."""
    found = []
    for row in PAGE.read_text().splitlines():
        cells = [
            re.sub(r"\\([|<*])", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", row)[1:-1]
        ]
        if len(cells) == 2 and cells[0].startswith("`"):
            found.append((cells[0].strip("`"), cells[1]))
    return found


@pytest.fixture(scope="module")
def folder(prepared) -> Path:
    return prepared


@pytest.fixture(scope="module")
def commands(folder) -> Commands:
    return Commands(folder)


def _listing(folder: Path) -> dict[Path, int]:
    """What lies there, and since when; who owns an existing run is noted in its .lock before
    anything is compared."""
    return {
        p: 0 if p.name == ".lock" else p.stat().st_mtime_ns
        for p in folder.rglob("*")
        if p.is_file()
    }


def _matches(message: str, pattern: str) -> bool:
    return (
        re.fullmatch(".*".join(re.escape(part) for part in pattern.split("…")), message) is not None
    )


@pytest.mark.parametrize(
    "command",
    sorted({re.search(r"[\w.]+\.\w+", line.replace("127.0.0.1", ""))[0] for line, _ in rows()}),
)
def test_messages_of_the_page(command, commands, folder):
    """Lines are run a command at a time; what is different is shown together."""
    wrong = []
    before = _listing(folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        lines = [
            row
            for row in rows()
            if re.search(r"[\w.]+\.\w+", row[0].replace("127.0.0.1", ""))[0] == command
        ]
        for line, message in lines:
            done = commands.run(line.replace("{port}", port))
            if done.status != 2 or not _matches(done.err, f"error: {message}\n"):
                wrong.append(f"{line}\n  status {done.status}: {done.err}  expected: {message}")
    assert not wrong, "\n".join(wrong)
    assert _listing(folder) == before, "something was written"


def test_the_page_has_every_command():
    told = " ".join(line for line, _ in rows())
    scripts = [*(ROOT / "launch").glob("*.py"), *(ROOT / "data_tools").glob("*.py")]
    for script in scripts:
        if '__name__ == "__main__"' in script.read_text():
            name = (
                f"launch/{script.name}"
                if script.parent.name == "launch"
                else f"data_tools.{script.stem}"
            )
            assert name in told, f"docs/errors.md has no wrong invocation of {name}"
    assert len(rows()) >= 30


@pytest.mark.parametrize(
    "line",
    [
        "python -m data_tools.shard nowhere.csv out --debug",
        "python -m data_tools.verify nowhere --debug",
        "python -m data_tools.synthesize out.parquet --users ten --debug",
        "python launch/train.py --config typo.yaml --debug",
        "python launch/evaluate.py --debug",
        "python launch/recommend.py --run run --debug",
        "python launch/plan.py --config small.yaml --ranks 0 --debug",
        "python launch/benchmark.py --config small.yaml --debug",
        "python launch/compare.py --config nowhere.yaml --output cmp --debug",
        "python launch/export.py --run run --output export --debug",
        "python launch/ensemble.py --members nowhere --output out --debug",
    ],
)
def test_debug_shows_the_traceback(line, commands):
    done = commands.run(line)
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err and done.err.splitlines()[-1].startswith(
        "error: "
    )
