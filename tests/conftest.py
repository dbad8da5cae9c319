"""Options and fixtures shared by all tests.

Tests, and every process that they start, compute with one thread unless OMP_NUM_THREADS says
otherwise: results are then the same bits wherever they are computed, and two workers of pytest do
not compete for two cores. Triton's kernels run in its interpreter, and GPUs are hidden, so that
`--device auto` is a CPU everywhere; TEST_GPU=0 shows the first one. This is not in
tests/__init__.py, because benchmarks import from tests, and must not be slowed down by it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("TEST_GPU", "")  # before torch looks for one

import pytest
import torch

from tests.oracles.rounding import RATIOS
from tests.support.invoke import Commands
from tests.support.jobs import LAUNCHED
from tests.support.paths import ROOT
from tests.support.wrong_inputs import prepare

LEFT: list[str] = []  # processes and threads that outlived the tests


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        default=str(ROOT.parent / "shared" / "data"),
        help="folder with ml-1m/ and gowalla/",
    )
    parser.addoption(
        "--fuzz",
        type=int,
        default=300,
        help="mutated files of tests/faults/test_fuzz.py (2000 before a release)",
    )
    parser.addoption(
        "--rounding",
        help="write every error over its bound (tests/oracles/rounding.py) to this file",
    )
    parser.addoption(
        "--loads",
        type=int,
        default=0,
        help="loads of tests/faults/test_readers_beside.py (200 before a release)",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=4,
        help="SIGKILLs of tests/faults/test_kill.py (50 before a release)",
    )


def pytest_make_parametrize_id(config, val, argname):
    """Name a parameter in a test's id by short, printable text, or else by its argument."""
    if isinstance(val, bytes):
        val = val.decode("latin-1")
    if isinstance(val, str):
        return (val if len(val) <= 60 else f"{val[:57]}...") if val.isprintable() else argname
    return argname if getattr(val, "__name__", "") == "<lambda>" else None


def pytest_collection_modifyitems(items):
    """Refuse ids that differ from run to run: addresses and temporary paths."""
    changing = [i.nodeid for i in items if re.search(r"\bat 0x|<lambda>|/tmp/", i.nodeid)]
    if changing:
        raise pytest.UsageError(f"give these parameters ids: {'; '.join(changing)}")


@pytest.fixture(scope="session")
def data_dir(request) -> Path:
    """The folder of real data sets; tests that ask for it skip where it is absent."""
    folder = Path(request.config.getoption("--data"))
    if not (folder / "ml-1m" / "ratings.csv.gz").is_file():
        pytest.skip(f"no real data under {folder}; pass --data=DIR")
    return folder


@pytest.fixture
def call(monkeypatch):
    """`call(main, arguments)` in this process; afterwards it is as before."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield lambda main, *arguments: main(
        [str(a) for a in arguments]
    )  # the process group stays: DeepSpeed keeps hold of it
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder of right and wrong inputs (wrong_inputs.py). Copy what a test writes to."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, Commands(folder))
    return folder


def pytest_terminal_summary(terminalreporter, config):
    """Say how many of the tests that need real data ran."""
    reports = [
        r
        for kind in ("passed", "failed", "skipped")
        for r in terminalreporter.stats.get(kind, [])
        if "data" in getattr(r, "keywords", ())  # a module that is skipped has none
    ]
    ran = sum(r.when == "call" for r in reports)
    terminalreporter.write_line(
        f"real-data tests: {ran} ran, {len({r.nodeid for r in reports}) - ran} skipped"
    )
    if RATIOS:
        ratio, what = max(RATIOS)
        terminalreporter.write_line(
            f"rounding: {len(RATIOS)} comparisons, the largest error is "
            f"{ratio:.2f} of its bound ({what})"
        )
    if config.getoption("--rounding"):
        lines = "".join(f"{ratio:.6f} {what}\n" for ratio, what in sorted(RATIOS, reverse=True))
        Path(config.getoption("--rounding")).write_text(lines)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Collect what a worker of pytest-xdist has found; a worker that died has nothing to say."""
    output = getattr(node, "workeroutput", {})
    RATIOS.extend((ratio, what) for ratio, what in output.get("ratios", ()))
    LEFT.extend(output.get("left", ()))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail where a test has left a process or a thread that the interpreter would wait for."""
    LEFT.extend(str(process) for process in multiprocessing.active_children())
    LEFT.extend(
        str(thread)
        for thread in threading.enumerate()
        if not thread.daemon
        and thread is not threading.main_thread()
        and not thread.name.startswith("ThreadPoolExecutor")  # the compiler's, ended at the exit
    )
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(left=LEFT, ratios=RATIOS)
    elif LEFT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nleft running by the tests: {'; '.join(LEFT)}")


def pytest_unconfigure(config):
    """Whatever else could hold the interpreter back: where it stands, and an end."""
    faulthandler.dump_traceback_later(300, exit=True)
