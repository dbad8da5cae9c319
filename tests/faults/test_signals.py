"""Signals are noticed whatever the main thread does, end a command through its clean-up, and stop a
training after a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_vasp.training.stop import StopRequest
from tests.support.jobs import hear_signals
from tests.support.paths import PYTHONPATH

COMMAND = """
import hashlib, os, signal, sys, time
from pathlib import Path
from dist_vasp.signals import EndedBySignal, ending_on_signals
def here():
    print("here", flush=True)
def busy():  # in C, where no Python handler runs
    here()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
def stubborn():  # the first signal does not end it
    try:
        here()
        time.sleep(600)
    except BaseException:
        time.sleep(600)
def idle():
    here()
    time.sleep(60)
try:
    with ending_on_signals(float(sys.argv[2])):
        try:
            globals()[sys.argv[1]]()
        finally:
            Path(sys.argv[3]).touch()
except EndedBySignal as ended:
    print(ended, flush=True)
    os._exit(ended.status)
"""


def start(code: str, *arguments: str | Path, **options) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": PYTHONPATH}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, env=env, text=True, preexec_fn=hear_signals, **pipes, **options
    )
    assert process.stdout and process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_ends_through_its_clean_up(tmp_path, number):
    process = start(COMMAND, "idle", 30, tmp_path / "cleaned")
    process.send_signal(number)
    told = "stopped by Ctrl-C" if number == signal.SIGINT else f"ended by {number.name}"
    assert process.communicate(timeout=30) == (f"{told}\n", "")
    assert process.returncode == 128 + number
    assert (tmp_path / "cleaned").exists()


def test_a_command_ends_although_its_main_thread_is_busy(tmp_path):
    process = start(COMMAND, "busy", 0.2, tmp_path / "cleaned")
    time.sleep(0.5)  # until it is busy
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", "error: ended by SIGTERM\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = start(COMMAND, "stubborn", 600, tmp_path / "cleaned")
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.kill()
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + signal.SIGINT
    assert not (tmp_path / "cleaned").exists()


STARTING = """
import os, subprocess, sys
from dist_vasp.commands.program import _start
RANK = "import time; from dist_vasp.signals import end_on_ctrl_c; end_on_ctrl_c(); time.sleep(600)"
print("here", flush=True)
class Interrupted(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__([sys.executable, "-c", RANK], **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), int(sys.argv[1]))
subprocess.Popen = Interrupted
os._exit(_start("train", 2))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_between_the_starts_of_two_ranks_ends_both(number):
    process = start(STARTING, int(number))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == ("error: stopped by Ctrl-C\n" if number == signal.SIGINT else "")
    ranks = [int(line) for line in out.split()]
    assert len(ranks) == 2
    for rank in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(rank, 0)


def test_nohup_is_respected(tmp_path):
    ignore = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start(ignore + COMMAND, "idle", 30, tmp_path / "cleaned")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_whoever_takes_a_signal_over_has_it_alone(tmp_path):
    """Neither an exception nor an end after the patience."""
    own = (
        "def own():\n    here()\n    signal.signal(signal.SIGTERM, lambda *_: "
        "print('own', flush=True))\n    time.sleep(0.5)\n    os.kill(os.getpid(), "
        "signal.SIGTERM)\n"
    )
    process = start(
        COMMAND.replace("def idle", own + "    time.sleep(0.5)\ndef idle"),
        "own",
        0.1,
        tmp_path / "cleaned",
    )
    assert process.communicate(timeout=30) == ("own\n", "")
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_training_is_asked_to_stop(number):
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    stop = StopRequest()
    assert not stop.requested
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.requested
    stop.close()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1, "the wake-up descriptor is given back"
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("front_end", [True, False])
def test_a_training_without_its_front_end_is_asked_to_stop(tmp_path, front_end):
    """`deepspeed` starts the launcher, the launcher the rank. SIGTERM ends `deepspeed` alone."""
    rank = (
        "import time\nfrom dist_vasp.training.stop import StopRequest\nstop = "
        "StopRequest()\nprint('here', flush=True)\n"
    )
    rank += (
        "deadline = time.monotonic() + 3\nwhile not stop.requested and "
        "time.monotonic() < deadline: time.sleep(0.05)\n"
    )
    rank += "print(stop.requested, flush=True)"
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {rank!r}])"
    script = tmp_path / ("deepspeed" if front_end else "start_and_leave")
    script.write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {launcher!r}])"
    )
    env = os.environ | {"PYTHONPATH": PYTHONPATH, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with subprocess.Popen(
        [sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "here\n"
        process.kill()
        assert process.stdout.readline() == f"{front_end}\n"
