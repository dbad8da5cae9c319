"""Commands as a user types them, each in a process of its own, without paying for the imports each
time.

A command runs in a fork of the process of ranks.py, which has imported the libraries: the script is
run as `__main__`, and what comes back is its exit status, standard output and standard error.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from dist_vasp.parallel import local_ranks
from tests.support.forks import become_launcher
from tests.support.jobs import LAUNCHED, free_port, launcher_arguments
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.ranks import rank_context

LIMIT_S = 300  # of one command: a disk that others keep busy makes a save wait


def run_script(
    script: str, *arguments: str | Path, ranks: int = 0, cwd: Path = ROOT.parent
) -> subprocess.CompletedProcess[str]:
    """Run `launch/{script}.py`, or with `ranks` under DeepSpeed's launcher of one host, in
    `cwd`."""
    words = ["python", str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)]
    return run_words(words, cwd, ranks=ranks)


def succeeds(script: str, *arguments: str | Path, ranks: int = 0) -> str:
    done = run_script(script, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    if not ranks:
        assert done.stderr == "", "a run that goes well has nothing to say on stderr"
    return done.stdout


def fails(script: str, *arguments: str | Path, ranks: int = 0) -> str:
    """The one line of a mistake that the user can mend."""
    done = run_script(script, *arguments, ranks=ranks)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or not ranks]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return lines[0]


def run_words(
    words: Sequence[str], cwd: Path, variables: Mapping[str, str] = {}, ranks: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python FILE ...`, `python -m MODULE ...` or the one word of a Python program."""
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": PYTHONPATH}
    if ranks:
        words = launcher_arguments(ranks, free_port(), words[1:])
    with tempfile.TemporaryDirectory() as folder:
        output = [str(Path(folder) / name) for name in ("out", "err")]
        child = rank_context().Process(
            target=_become,
            args=(list(words), str(cwd), environment | dict(variables), output, ranks),
        )
        child.start()
        child.join(LIMIT_S)
        assert child.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # loader workers of one that did not end by itself
        child.join()
        out, err = (Path(path).read_text() if os.path.exists(path) else "" for path in output)
    return subprocess.CompletedProcess(words, child.exitcode, out, err)


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


class Commands:
    """Runs lines in `folder`.

    Lines that are no command are Python with `Recommender` and `r`, the recommender of
    `folder`/export, at hand.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, line: str) -> Done:
        words, variables = [line], {}
        if re.match(r"([A-Z_]+=\S* )*python ", line):
            words = shlex.split(line)
            while words[0] != "python":
                name, value = words.pop(0).split("=", 1)
                variables[name] = value
            words[1] = str(ROOT / words[1]) if words[1].startswith("launch/") else words[1]
        done = run_words(words, self.folder, variables)
        return Done(done.returncode, done.stdout, done.stderr)

    def succeed(self, *lines: str) -> None:
        """Run lines that have to work."""
        for line in lines:
            done = self.run(line)
            assert done.status == 0, f"{line}: {done.status}\n{done.out}{done.err}"


class ForkedRank:
    """What `LocalRanks` takes for a `subprocess.Popen`: a fork that runs `dist_vasp ...`."""

    def __init__(
        self,
        command: list[str],
        env: dict[str, str],
        stdout: BinaryIO | None,
        stderr: BinaryIO | None,
        stdin: int,
        start_new_session: bool,
    ) -> None:
        assert stdout is stderr and stdin == subprocess.DEVNULL and start_new_session
        words = ["python", *command[command.index("-m") :]]
        descriptors = [stdout.fileno()] * 2 if stdout else [1, 2]
        output = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in descriptors]
        self._process = rank_context().Process(
            target=_become, args=(words, os.getcwd(), env, output, 0)
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def forked_local_ranks() -> SimpleNamespace:
    """To put in the place of `subprocess` in dist_vasp.parallel.local_ranks."""
    return SimpleNamespace(Popen=ForkedRank, DEVNULL=subprocess.DEVNULL)


# --- the process that becomes the command -------------------------------------------------------


def _become(
    words: list[str], cwd: str, environment: dict[str, str], output: list[str], ranks: int
) -> None:
    """Never returns: what Python does with a script, to its end."""
    status = 1
    os.setsid()
    faulthandler.dump_traceback_later(LIMIT_S - 5)
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in output]
    for descriptor, file in enumerate(files):
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    local_ranks.subprocess = forked_local_ranks()  # type: ignore[assignment]
    try:
        status = _run(words, ranks)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(words: list[str], ranks: int) -> int:
    if ranks:
        become_launcher(words)
    elif len(words) == 1:
        return _python(words[0])
    elif words[1] == "-m":
        sys.argv = words[2:]
        name = "dist_vasp.__main__" if words[2] == "dist_vasp" else words[2]
        sys.modules.pop(name, None)  # or runpy warns that it is imported already
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
    return 0


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
