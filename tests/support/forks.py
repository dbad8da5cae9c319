"""Launchers and ranks that are forked from one process, so that a job starts without loading the
libraries again.

`Forks()` starts that process. `Job(..., forks=...)` asks it for a launcher: a fork that runs
DeepSpeed's own per-host launcher, whose ranks are forks too. Seen from outside they are what
`deepspeed` starts: a process group, a launcher with its signal handlers, and under it one process
for each rank.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.paths import PYTHONPATH, ROOT

LOADED = (
    "dist_vasp.commands.train",
    "deepspeed.launcher.launch",
    *(
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "deepspeed.runtime.zero.muon.original_muon",
    ),  # with the first optimizer
)


class Forks:
    """The process that forks; close it, or use it as a context."""

    def __init__(self) -> None:
        environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # jemalloc has a thread
        environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        environment |= {
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
        }  # more threads than cores
        command = [sys.executable, "-m", "tests.support.forks"]
        self._server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, launcher: list[str], environment: dict[str, str], log: Path) -> Forked:
        assert self._server.stdin and self._server.stdout
        status = log.with_name(f"{log.name}.status-{time.monotonic_ns()}")
        request = {"argv": launcher, "env": environment, "log": str(log), "status": str(status)}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return Forked(int(self._server.stdout.readline()), status)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(30)


class Forked:
    """A launcher, with what `subprocess.Popen` offers of it."""

    def __init__(self, pid: int, status: Path) -> None:
        self.pid, self._status = pid, status

    def poll(self) -> int | None:
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("launcher", timeout)
            time.sleep(0.01)
        return status


# --- the process that forks -----------------------------------------------------------------------


def _serve() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    for name in LOADED:
        importlib.import_module(name)
    statuses: dict[int, str] = {}
    while True:
        while statuses and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            path = statuses.pop(ended[0])
            Path(f"{path}.tmp").write_text(str(os.waitstatus_to_exitcode(ended[1])))
            os.replace(f"{path}.tmp", path)
        if not select.select([0], [], [], 0.02)[0]:
            continue
        line = _read_line()
        if not line:
            return
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _launch(request)
        statuses[pid] = request["status"]
        with contextlib.suppress(ProcessLookupError):
            os.setpgid(pid, pid)
        print(pid, flush=True)


def _read_line() -> bytes:
    """One line of standard input, not more: what `select` sees is not in a buffer."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return line


def _launch(request: dict[str, Any]) -> None:
    """Become the launcher; never returns."""
    status = 1
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for descriptor, file in zip(
            (0, 1, 2), (os.open(os.devnull, os.O_RDONLY), log, log), strict=True
        ):
            os.dup2(file, descriptor)
        _set_environment(request["env"])
        become_launcher(request["argv"])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        os._exit(status)


def become_launcher(words: list[str]) -> None:
    """Run DeepSpeed's launcher of one host, with ranks that are forks."""
    from deepspeed.launcher import launch as launcher

    sys.argv = words
    launcher.subprocess = SimpleNamespace(Popen=_Rank)
    launcher.main()


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class _Rank:
    """What the launcher takes for a `Popen`: a fork that runs the script."""

    def __init__(self, cmd: list[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(
                    number,
                    signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
                )
            _set_environment(env)
            sys.argv = cmd[cmd.index("-u") + 1 :]
            runpy.run_path(sys.argv[0], run_name="__main__")
            os._exit(1)  # every script of launch/ ends the process

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


if __name__ == "__main__":
    _serve()
    os._exit(0)
