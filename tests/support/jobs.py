"""Training jobs of several ranks, as processes that a test may kill: start, watch, signal, and see
the end of.

A job runs in a process group of its own, so that a signal to "the whole process group" reaches the
launcher, the ranks and their loader workers and nothing else, and so that whatever outlives the
launcher can be found and, at the end, ended.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import psutil

from tests.support.forks import Forked, Forks
from tests.support.paths import ROOT

LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
PATIENCE_S = 120.0  # a hang, not a slow machine


def hear_signals() -> None:
    """Handle signals as at a terminal: the tests may run under nohup, or in the background, where a
    shell ignores Ctrl-C."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would have put there."""
    return (
        {k: v for k, v in os.environ.items() if k not in LAUNCHED}
        | {"DS_ACCELERATOR": "cpu"}
        | more
    )


def launcher_arguments(ranks: int, port: int, script: Sequence[str]) -> list[str]:
    """The module that `deepspeed --num_accelerators N` runs on each host, and its arguments."""
    hosts = json.dumps({"localhost": list(range(ranks))})
    world = base64.urlsafe_b64encode(hosts.encode()).decode()
    return ["deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={port}", *script]


class Job:
    """`launch/train.py` on `ranks` ranks, under DeepSpeed's per-host launcher or, with `bare`,
    started rank by rank.

    Without a launcher each rank's exit status can be read, and no one ends the others when one
    fails. Use it as a context manager: leaving it ends whatever is left. `variables` are added to
    the environment; `forks` starts launcher and ranks fast.
    """

    def __init__(
        self,
        *arguments: str | Path,
        log: Path,
        ranks: int = 2,
        bare: bool = False,
        cwd: Path = ROOT,
        variables: Mapping[str, str] = {},
        forks: Forks | None = None,
    ) -> None:
        self.log, port = log, free_port()
        hear_hangups = partial(
            signal.signal, signal.SIGHUP, signal.SIG_DFL
        )  # the tests may run under nohup
        train = [str(ROOT / "launch" / "train.py"), *map(str, arguments)]
        self._output = open(log, "ab")  # noqa: SIM115 - held as long as the job
        streams = {
            "stdin": subprocess.DEVNULL,
            "stdout": self._output,
            "stderr": subprocess.STDOUT,
            "cwd": cwd,
            "preexec_fn": hear_hangups,
        }
        if bare:
            self.started: list[subprocess.Popen[bytes] | Forked] = []
            for rank in range(ranks):
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": ranks,
                    "LOCAL_SIZE": ranks,
                    "MASTER_PORT": port,
                }
                env = environment(
                    MASTER_ADDR="127.0.0.1", **{k: str(v) for k, v in place.items()}, **variables
                )
                group = self.started[0].pid if self.started else 0
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, *train], env=env, process_group=group, **streams
                    )
                )
        else:
            # what `deepspeed --num_accelerators N` runs on each host, without the seconds that its
            # front end takes
            launcher = launcher_arguments(ranks, port, train)
            env = environment(**variables)
            if forks:
                self.started = [forks.start(launcher, env, log)]
            else:
                self.started = [
                    subprocess.Popen(
                        [sys.executable, "-m", *launcher],
                        env=env,
                        start_new_session=True,
                        **streams,
                    )
                ]
        self.n_ranks, self.bare, self.forked, self.group = (
            ranks,
            bare,
            forks is not None,
            self.started[0].pid,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            process.kill()
        for launched in self.started:
            launched.wait(PATIENCE_S)
        self._output.close()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every process of the job that still runs: launcher, ranks, loader workers, orphans
        too."""
        found = []
        for process in psutil.process_iter():
            try:
                if (
                    os.getpgid(process.pid) == self.group
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def ranks(self) -> list[int]:
        """The process ids of the ranks that run, in order."""
        if self.bare:
            return [p.pid for p in self.started]
        try:
            children = psutil.Process(self.started[0].pid).children()
            if self.forked:  # all have one command line
                return sorted(child.pid for child in children)
            named = {p.pid: p.cmdline() for p in children}
        except psutil.NoSuchProcess:
            return []
        places = {
            next((a for a in line if a.startswith("--local_rank=")), ""): pid
            for pid, line in named.items()
        }
        return [places[name] for name in sorted(places) if name]

    def wait_until(
        self, condition: Callable[[], bool], what: str, every: float = 0.005, ended: bool = False
    ) -> None:
        """Come back when `condition()` holds; fail where it takes for ever, or the job ends first:
        unless `ended` is as good."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if ended and self.started[0].poll() is not None:
                return
            assert self.started[0].poll() is None, f"the job ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, (
                f"no sign of {what} after {PATIENCE_S:.0f} s:\n{self.output}"
            )
            time.sleep(every)

    def wait_for_ranks(self) -> list[int]:
        self.wait_until(lambda: len(self.ranks()) == self.n_ranks, "the ranks were started", 0.05)
        return self.ranks()

    def signal_rank(self, rank: int, number: int) -> None:
        os.kill(self.ranks()[rank], number)

    def signal_group(self, number: int) -> None:
        os.killpg(self.group, number)

    def end(self, within: float = PATIENCE_S) -> list[int]:
        """The exit status of the launcher (of each rank where there is none), once no process of
        the job is left."""
        deadline = time.monotonic() + within
        try:
            statuses = [
                process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.started
            ]
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the job still runs after {within:.0f} s:\n{self.output}"
            ) from None
        while left := self.processes():
            assert time.monotonic() < deadline, (
                f"{left} outlive the job by {within:.0f} s:\n{self.output}"
            )
            time.sleep(0.05)
        return statuses


class RunFolder:
    """What a run has written so far, read while it runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.metrics, self.checkpoints = (
            path,
            path / "metrics.jsonl",
            path / "checkpoints",
        )

    def lines(self) -> list[dict]:
        """The whole lines of metrics.jsonl."""
        try:
            text = self.metrics.read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def step(self) -> int:
        """The last step that is told of."""
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def opened(self) -> int:
        """Changes when a resumed run opens metrics.jsonl, from when on its lines are the new
        run's."""
        try:
            return self.metrics.stat().st_ino
        except FileNotFoundError:
            return 0

    def saving(self) -> bool:
        return any(self.checkpoints.glob(".*.tmp"))

    def newest(self) -> Path | None:
        steps = sorted(p.parent for p in self.checkpoints.glob("step-*/checkpoint.json"))
        return steps[-1] if steps else None

    def saved_step(self) -> int:
        newest = self.newest()
        return int(newest.name.split("-")[1]) if newest else 0

    def weights(self) -> dict[str, bytes]:
        """The bytes of every tensor file of the newest and of the best checkpoint."""
        newest, best = self.newest(), (self.checkpoints / "best").resolve()
        assert newest is not None
        folders = [newest, best] if best.exists() else [newest]
        return {
            f"{f.name}/{p.name}": p.read_bytes()
            for f in folders
            for p in sorted(f.glob("*.safetensors"))
        }

    def told(self) -> list[dict]:
        """metrics.jsonl without what a clock has measured, or what a start changes: memory, and
        what has been sent ahead."""
        clocked = ("users_per_second", "step_seconds", "data_wait", "memory", "bytes_moved")
        return [{k: v for k, v in line.items() if k not in clocked} for line in self.lines()]


def assert_same_run(found: RunFolder, expected: RunFolder) -> None:
    """Bitwise: parameters, moments, best weights, and every number of every step and evaluation."""
    ours, theirs = found.weights(), expected.weights()
    assert sorted(ours) == sorted(theirs)
    for name in theirs:
        assert ours[name] == theirs[name], f"{name} differs"
    assert found.told() == expected.told()


SIGNALS = (signal.SIGTERM, signal.SIGINT)
