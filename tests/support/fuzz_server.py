"""Runs the commands on mutated files, each case in a forked process of its own with limits on
memory, time and file size.

    python -m tests.support.fuzz_server BASE FIRST STOP [STEP]      one line of JSON per seed

A fork of a process that has imported everything costs milliseconds where a fresh interpreter costs
seconds; what runs in it is the launch script's own `main` under `dist_vasp.commands.ending.run`, so
exit status and stderr are those of the command.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.support.sizes import sizes

MEMORY = 4 << 30  # bytes of address space beyond what the imports take
GROWTH = (
    400 << 10
)  # kilobytes of resident memory beyond the server's: a bomb that bursts and is caught is seen here
SECONDS = 60


def arguments(folder: Path, run_dir: Path, kind: str, steps: int, *more: str) -> list[str]:
    """A tiny run in one process."""
    return [
        *(
            "--data.shards",
            str(folder / "shards"),
            "--run.dir",
            str(run_dir),
            "--device",
            "cpu",
            "--data.workers",
            "0",
        ),
        *(
            "--data.batch_size",
            "16",
            "--parallel.lanes",
            "4",
            "--run.max_steps",
            str(steps),
            "--model.kind",
            kind,
        ),
        *sizes(),
        *("--optimizer.schedule", "[{epochs: 3, lr: 0.01}]", *more),
    ]


def commands(seed: int, folder: Path, file: str, run: str | None) -> list[tuple[str, list[str]]]:
    """What a user would start on these files."""
    if run is None:
        kind = "vasp" if seed % 8 == 0 else "nease"
        return [
            ("train", arguments(folder, folder / "new", kind, 2)),
            ("verify", [str(folder / "shards")]),
        ]
    recommend = [
        "--run",
        str(folder / run),
        "--histories",
        str(folder / "histories.csv"),
        "--k",
        "5",
        "--device",
        "cpu",
    ]
    recommend += ["--output", str(folder / "lists.csv")]
    if "best-" in file:
        new = arguments(folder, folder / "new", run, 1, "--init_from", str(folder / run))
        return [("recommend", recommend), ("train", new)]
    resumed = arguments(folder, folder / run, run, 3)
    return [("recommend", [*recommend, "--checkpoint", "step-00000002"]), ("train", resumed)]


def import_everything() -> dict[str, Callable[[], int]]:
    """Before the first fork: nothing here starts a thread or a process group."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401 - it compiles as it is imported, which takes seconds
    import pyarrow.dataset  # noqa: F401
    import torch
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import data_tools.verify
    import launch.recommend
    import launch.train
    from dist_vasp.commands.ending import run
    from dist_vasp.config.command_line import from_dict
    from dist_vasp.config.schema import Config

    torch.set_num_threads(1)
    from_dict(asdict(Config()))  # reads sources and fills caches
    gc.collect()
    gc.freeze()  # or every child would copy all pages as it counts references
    return {
        "train": lambda: run(launch.train.main),
        "recommend": lambda: run(launch.recommend.main),
        "verify": lambda: sys.exit(data_tools.verify.main()),
    }


def forked(main: Callable[[], int], argv: list[str], folder: Path) -> tuple[int, str, int]:
    """(exit status or minus the signal, stderr, peak resident kilobytes) of `main` in a child with
    limits."""
    errors = folder / "stderr"
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(folder)
            with open(errors, "wb") as stderr, open(folder / "stdout", "wb") as stdout:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.argv = ["command", *argv]
            main()
        except SystemExit as exit_:
            os._exit(exit_.code if isinstance(exit_.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)
    deadline = time.monotonic() + SECONDS
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            return (
                os.waitstatus_to_exitcode(status),
                errors.read_text(errors="replace"),
                used.ru_maxrss,
            )
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return -signal.SIGALRM, f"no end within {SECONDS} s", 0
        time.sleep(0.005)


def judge(script: str, status: int, stderr: str, peak: int, own: int) -> str:
    """`checksum` or `parser` (detected), `went on`, `diverged` (named as such), else `FAILED:
    why`."""
    lines = stderr.splitlines()
    if peak > own + GROWTH:
        return f"FAILED: {peak - own} kilobytes taken"
    if status == 0 and not lines:
        return "went on"
    readable = all(
        line.startswith("error: ") and len(line) < 2000 and line.isprintable() for line in lines
    )
    swallowed = any(
        sign in stderr for sign in ("MemoryError", "can't allocate", "std::bad_alloc", "Traceback")
    )
    if not readable or swallowed or (len(lines) != 1 and script != "verify") or not lines:
        return f"FAILED: status {status}, stderr {stderr[-1500:]}"
    if status == 2:
        return (
            "checksum"
            if any("SHA-256" in line or "header_sha256" in line for line in lines)
            else "parser"
        )
    return (
        "diverged"
        if status == 1 and "error: step " in stderr and "last good checkpoint" in stderr
        else f"FAILED: status {status}, {stderr}"
    )


def main(base: Path, first: int, stop: int, step: int) -> None:
    mains = import_everything()
    from tests.support.fuzz_files import CANARY, mutate

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, stop, step):
        with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as scratch:
            folder = Path(scratch) / "case"
            shutil.copytree(base, folder, symlinks=True)
            mutation = mutate(seed, folder)
            results = {}
            for script, argv in commands(seed, folder, mutation.file, mutation.run):
                outcome = judge(script, *forked(mains[script], argv, folder), own)
                if (folder / CANARY).exists() or list(Path("/tmp").glob(f"{CANARY}*")):
                    outcome = "FAILED: code of the file was run"
                results[script] = outcome
            print(json.dumps({"seed": seed, **asdict(mutation), "results": results}), flush=True)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        int(sys.argv[4]) if len(sys.argv) > 4 else 1,
    )
