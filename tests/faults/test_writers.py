"""Commands that write a file: full and read-only disks, outputs that are not its own, two at once,
signals.

The cases are those of tests/support/writers.py. WRITERS=all runs every writer, else those that show
each kind of output.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.invoke import Commands
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.writers import SITUATIONS, SLOW, WRITERS, complaint, line_of, set_up, state


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory) -> Path:
    return Path(shutil.copytree(prepared, tmp_path_factory.mktemp("writers") / "w", symlinks=True))


@pytest.fixture(scope="module")
def commands(folder):
    set_up(folder)
    return Commands(folder)


ALL = os.environ.get("WRITERS") == "all"  # else those that show each kind of output
SHOWN = [
    writer for writer in WRITERS if ALL or writer in ("shard", "train", "recommend csv", "export")
]
CASES = [(writer, situation) for writer in SHOWN for situation in SITUATIONS]


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "situation"), CASES)
def test_writer(writer, situation, folder, commands):
    assert not SITUATIONS[situation](writer, folder, commands)


@pytest.mark.slow
@pytest.mark.parametrize(
    "writer", [w for w in SHOWN if w not in (*SLOW, "train", "compare", "benchmark")]
)
def test_two_at_the_same_moment(writer, folder, commands, tmp_path_factory):
    """One of them writes the whole output, the other says so, or comes later and finds or replaces
    it."""
    place = folder / "both-at-once"
    for _ in range(4 if ALL else 2):
        place.mkdir()
        line = line_of(writer, f"{place.name}/{WRITERS[writer][1]}").removesuffix(" --overwrite")
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(commands.run, (line, line)))
        assert any(done.status == 0 for done in answers), answers
        wrong = [complaint(done, "another command|exists") for done in answers if done.status]
        assert not any(wrong), wrong
        once = state(place)
        assert once and not [name for name in once if name.endswith((".tmp", ".lock", ".old"))]
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["shard", "recommend csv", "synthesize"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(writer, number, folder, commands):
    """The signal comes once the temporary name is there."""
    place = folder / f"stopped-{writer.split()[0]}-{number}"
    place.mkdir()
    line = (
        line_of(writer, f"{place.name}/{WRITERS[writer][1]}")
        .replace("2000", "900000")
        .replace("40000", "40000000")
    )
    words = shlex.split(line)
    words = [
        sys.executable,
        *(str(ROOT / word) if word.startswith("launch/") else word for word in words[1:]),
    ]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not any(
            name.endswith(".tmp") for name in os.listdir(place)
        ):
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 128 + number), said  # 0: it came too late
    assert "Traceback" not in said
    assert process.returncode == 0 or not os.listdir(place)
