"""Standard output that is closed, broken, full or of another encoding ends no command; nothing
printed controls a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vasp.text import escape, one_line, printable
from tests.support.paths import PYTHONPATH

COMMAND = """
import os, sys
from dist_vasp import console
console.guard()
for i in range(3000):
    print("line", i, "caf\\u00e9 \\x1b[2J\\x9b1m \\u202e \\udcc3", flush=True)
with open(sys.argv[1], "w") as handle:
    print(handle.fileno(), "written", file=handle)
os._exit(console.final_status(0))
"""


def run(out: Path, tail: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """COMMAND in a shell that continues with `tail`; its exit status is that of the command."""
    line = f'"{sys.executable}" -c "$0" "$1" {tail}; exit ${{PIPESTATUS[0]}}'
    env = os.environ | {"PYTHONPATH": PYTHONPATH} | environment
    return subprocess.run(
        ["bash", "-c", line, COMMAND, str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("tail", "status", "said"),
    [
        ("", 0, ""),
        (
            "| head -n 1",
            0,
            "warning: standard output cannot be written (Broken pipe); the command continues\n",
        ),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full 2>&1", 1, ""),
        (
            "> /dev/full",
            1,
            "warning: standard output cannot be written (No space left on "
            "device); the command continues\n"
            "error: standard output could not be written (No space left on "
            "device); what was printed is lost, files are complete\n",
        ),
    ],
)
def test_the_command_continues(tmp_path, tail, status, said):
    done = run(tmp_path / "file", tail)
    assert (done.returncode, done.stderr) == (status, said)
    descriptor, text = (tmp_path / "file").read_text().split()
    assert text == "written" and int(descriptor) > 2, "no file has the number of a standard stream"


def test_what_is_printed_controls_no_terminal(tmp_path):
    assert (
        run(tmp_path / "file").stdout.splitlines()[0] == r"line 0 café \x1b[2J\x9b1m \u202e \udcc3"
    )


def test_an_encoding_without_the_letter(tmp_path):
    done = run(tmp_path / "file", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == r"line 0 caf\xe9 \x1b[2J\x9b1m \u202e \udcc3"


def test_a_command_in_an_ascii_locale(tmp_path):
    """Names of files and their text are UTF-8 whatever the locale says."""
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (tmp_path / "données.csv").write_text("user,item\nzoë,1\n", encoding="utf-8")
    line = [sys.executable, "-m", "data_tools.shard", "données.csv", "out"]
    env = os.environ | {"PYTHONPATH": PYTHONPATH} | ascii_locale
    done = subprocess.run(
        line, cwd=tmp_path, env=env, capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no user has 5 items or more"), done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31m",
        "\x00",
        "\x7f",
        "\x9b5m",
        "\u202e",
        "\u2066",
        "\u2028",
        "\u200f",
        "\ud800",
        "a\rb",
    ],
)
def test_control_characters_are_escaped(text):
    for made in (printable(text), one_line(text), escape(text)):
        assert made.isprintable(), ascii(made)


def test_letters_stay():
    text = "Amélie 東京 עברית नमस्ते 👩‍🚀 <b>"
    assert printable(text) == text
    assert printable("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert one_line(" two\n  lines ") == "two lines"
    assert escape("<b> \x1b") == "&lt;b&gt; \\x1b"
