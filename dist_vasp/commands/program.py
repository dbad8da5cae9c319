"""The program `dist-vasp`: every command as a subcommand, with the options of its script.

`dist-vasp train --ranks 2 ...` starts the ranks itself, and so do evaluate and recommend. Signals
are passed on to the ranks, and the exit status is theirs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dist_vasp.command_line import Parser, at_least, did_you_mean
from dist_vasp.console import guard
from dist_vasp.extras import about_missing
from dist_vasp.parallel.local_ranks import LocalRanks
from dist_vasp.signals import SignalWatch, end_on_ctrl_c, holding_signals
from dist_vasp.versions import __version__

_REINSTALL = "install what is missing: pip install . in a clone of the project"
_ON_RANKS = {
    "train": "train a model, or resume its training",
    "evaluate": "compute the metrics of a run or a baseline",
    "recommend": "write top-N lists for histories",
}
_ON_ONE = {
    "explain": "say why items are recommended",
    "report": "write an HTML page on runs",
    "compare": "train and test several models",
    "ensemble": "combine several runs into one model",
    "export": "write a trained model as one folder",
}
_BEFORE = {
    "doctor": "check this machine, the data and the configuration",
    "plan": "memory, traffic and time of a step, computed",
    "benchmark": "memory, traffic and time of a step, measured",
}
_TOOLS = {
    "shard": "convert interactions to shards",
    "verify": "check a folder of shards",
    "synthesize": "make interactions of a chosen size",
}
_ABOUT = {
    "demo": "a first run from data to lists, in half a minute",
    "configs": "list or copy the configurations of the package, or that of a run",
    "completion": "print a script that completes commands in a shell",
}
COMMANDS = {**_TOOLS, **_ON_RANKS, **_ON_ONE, **_BEFORE, **_ABOUT}
"""What each command does, by its name."""


def parser_of(name: str) -> str:
    """Return the module whose function `parser` makes the parser of a command."""
    if name in _TOOLS:
        return "data_tools.options" if name == "shard" else f"data_tools.{name}"
    return f"dist_vasp.commands.{name}"


def main() -> NoReturn:
    """Run the command that sys.argv names, and exit with its status."""
    end_on_ctrl_c()
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        guard()
        print(_help())
        sys.exit(0)
    if name == "--version":
        print(f"dist-vasp {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        guess = did_you_mean(name, COMMANDS)
        _end(f"{name} is not a command{guess}; `dist-vasp --help` lists them")
    sys.argv = [f"dist-vasp {name}", *arguments]
    if name == "demo":  # short steps: threads that wait by spinning would slow each other down
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if name in _TOOLS:
        sys.exit(importlib.import_module(f"data_tools.{name}").main())
    if name in _ON_RANKS:
        n_ranks, launched = _take_ranks(), os.environ.get("WORLD_SIZE")
        if n_ranks and launched not in (None, str(n_ranks)):
            _end(
                f"--ranks is {n_ranks}, but a launcher has set WORLD_SIZE={launched}; leave out "
                "--ranks, or unset WORLD_SIZE"
            )
        asks_for_help = {"-h", "--help", "--help-all"} & set(sys.argv)
        if n_ranks and n_ranks > 1 and launched is None and not asks_for_help:
            sys.exit(_start(name, n_ranks))
    _run(name)


def run_script(name: str) -> NoReturn:
    """Run a command under a launcher, or by itself: launch/NAME.py."""
    end_on_ctrl_c()
    _run(name)


def _run(name: str) -> NoReturn:
    try:
        command = importlib.import_module(f"dist_vasp.commands.{name}")
        ending = importlib.import_module("dist_vasp.commands.ending")
    except ImportError as missing:
        _end(about_missing(missing) or f"{missing}; {_REINSTALL}", 1)
    run: Callable[..., NoReturn] = ending.run
    run(command.main)


def _take_ranks() -> int | None:
    """Remove --ranks N from sys.argv and return N; None where it is not there."""
    parser = Parser(prog=sys.argv[0], add_help=False)
    parser.add_argument("--ranks", type=at_least(1))
    debug = ["--debug"] if "--debug" in sys.argv else []
    try:
        found, rest = parser.parse_known_args(sys.argv[1:])
    except ValueError as error:
        _end(str(error))
    sys.argv[1:] = [*rest, *debug]
    return found.ranks


def _start(name: str, n_ranks: int) -> int:
    """Start the ranks, pass signals on to them, and return their exit status."""
    guard()
    with holding_signals():
        ranks = LocalRanks([name, *sys.argv[1:]], n_ranks)
        watch = SignalWatch(ranks.signal)
    with ranks:
        try:
            status = ranks.wait()
        finally:
            watch.close()
    assert status is not None
    return status


def _help() -> str:
    lines = ["usage: dist-vasp COMMAND [options]; `dist-vasp COMMAND --help` lists the options", ""]
    titles = {
        "data": _TOOLS,
        "models, on one or several ranks with --ranks N": _ON_RANKS,
        "trained models": _ON_ONE,
        "before a job": _BEFORE,
        "this program": _ABOUT,
    }
    for title, commands in titles.items():
        lines += [f"{title}:", *(f"  {name:<12}{text}" for name, text in commands.items()), ""]
    return "\n".join(lines[:-1])


def _end(text: str, status: int = 2) -> NoReturn:
    guard()
    print(f"error: {text}", file=sys.stderr)
    sys.exit(status)
