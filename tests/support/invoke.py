"""Commands as a user types them, each in a process of its own, without paying for the imports each
time.

`Commands(folder)` starts one process that loads the libraries once and forks for every line that is given to it: what
comes back is the true exit status, standard output and standard error of `python launch/X.py ...` or `python -m data_tools.X ...`.
Lines that are no command are Python with `Recommender` and `r`, the recommender of `folder`/export, at hand.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

LIMIT_S = 300  # of one command: a disk that others keep busy makes a save wait
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


class Commands:
    """Runs lines in `folder`; close it, or use it as a context."""

    def __init__(self, folder: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
        environment |= {
            "ARROW_DEFAULT_MEMORY_POOL": "system"
        }  # jemalloc has a thread, and a fork of two threads may hang
        environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.invoke"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, line: str) -> Done:
        assert self._server.stdin and self._server.stdout
        print(json.dumps(line), file=self._server.stdin, flush=True)
        return Done(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)

    def succeed(self, *lines: str) -> None:
        """Run lines that have to work."""
        for line in lines:
            done = self.run(line)
            assert done.status == 0, f"{line}: {done.status}\n{done.out}{done.err}"

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- the process that forks --------------------------------------------------------------------------------------------


def _serve() -> None:
    for name in (
        "train",
        "evaluate",
        "recommend",
        "plan",
        "benchmark",
        "compare",
        "export",
        "report",
        "doctor",
    ):
        importlib.import_module(f"launch.{name}")
    for name in ("shard", "verify", "synthesize"):
        importlib.import_module(f"data_tools.{name}")
    importlib.import_module("dist_vasp.ranking.recommender")
    for line in sys.stdin:
        print(json.dumps(_forked(json.loads(line))), flush=True)


def _forked(line: str) -> dict[str, Any]:
    files = [os.memfd_create(name) for name in ("out", "err")]
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.alarm(LIMIT_S)  # ended by the kernel: a status of -14
        for descriptor, file in zip(
            (0, 1, 2), (os.open(os.devnull, os.O_RDONLY), *files), strict=True
        ):
            os.dup2(file, descriptor)
        _become(line)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # loader workers of one that did not end by itself
    texts = []
    for file in files:
        os.lseek(file, 0, os.SEEK_SET)
        with open(file, "rb") as handle:
            texts.append(handle.read().decode())
    return {"status": status, "out": texts[0], "err": texts[1]}


def _become(line: str) -> None:
    """Never returns: what Python does at the end of a script."""
    status = 1
    faulthandler.dump_traceback_later(LIMIT_S - 5)
    try:
        words = shlex.split(line)
        while "=" in words[0] and words[0].split("=")[0].replace("_", "").isupper():
            name, value = words.pop(0).split("=", 1)
            os.environ[name] = value
        if words[0] == "python" and words[1] == "-m":
            status = _exit_status(importlib.import_module(words[2]).main, words[2:])
        elif words[0] == "python":
            script = importlib.import_module(f"launch.{Path(words[1]).stem}")
            ending = importlib.import_module("dist_vasp.commands.ending")
            status = _exit_status(lambda: ending.run(script.main), words[1:])
        else:
            status = _python(line)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _exit_status(main: Callable[[], Any], argv: Sequence[str]) -> int:
    sys.argv = list(argv)
    try:
        return main() or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _python(line: str) -> int:
    """Run the statements of `line`, print the value of the last one; a ValueError is `error: ...`
    and 2, as in a command."""
    from dist_vasp import Recommender

    names: dict[str, Any] = {"Recommender": Recommender}
    try:
        if Path("export").is_dir():
            names["r"] = Recommender.load("export")
        *statements, last = ast.parse(line).body
        exec(compile(ast.Module(statements, []), "line", "exec"), names)
        print(
            eval(compile(ast.Expression(last.value), "line", "eval"), names)
            if isinstance(last, ast.Expr)
            else ""
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    _serve()
    os._exit(0)  # the interpreter's own end takes seconds to a minute with all that is loaded
