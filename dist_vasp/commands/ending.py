"""Run a command on every rank and end its process: exit status, one readable line for an error.

Exit status 0: done; 2: bad input or configuration; 128 + N: ended by signal N (a training saves
first, and exits with 0 unless it was Ctrl-C); 1: anything else. Rank 0 prints the errors that all
ranks meet; an error that only one rank meets is printed by that rank.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from dist_vasp.command_line import Parser, program
from dist_vasp.console import final_status, guard
from dist_vasp.failure import failure_of, is_out_of_memory
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.launched import launched_world, meeting_point
from dist_vasp.parallel.start import (
    LostPeerError,
    is_initialized,
    is_lost_peer,
    leave,
    lost_rank,
    shut_down,
)
from dist_vasp.signals import INTERRUPTED, EndedBySignal, ending_on_signals
from dist_vasp.text import one_line
from dist_vasp.training.step.step_report import DivergedError

Main = Callable[[Sequence[str] | None], int | None]

_VERDICT_S = 3.0  # a collective may fail a little before the lost rank is known
_PATIENCE_S = 5.0  # between a signal and the end of a command that does not save
# A launcher ends all ranks when the first one exits: rank 0 must have printed its error by then.
_LINGER_S = 1.0


def run(main: Main) -> NoReturn:
    """Call `main(None)`, which parses sys.argv, and exit with the status it returns."""
    guard()
    warnings.filterwarnings("ignore", category=FutureWarning)
    failed = ""  # the error of this rank alone, sent to the others
    rank = 0  # until the environment has been checked every rank prints its own errors
    try:
        with ending_on_signals(_PATIENCE_S):
            launched_rank, world_size = launched_world()[:2]
            if world_size > 1:
                meeting_point(world_size)
            rank = launched_rank
            status = main(None) or 0
    except (Exception, EndedBySignal) as error:
        failed, status = _report(error, rank)
    status = final_status(status)
    leave(failed, status)
    if status == 0:
        shut_down()
    sys.stderr.flush()
    # Skip the interpreter's own end. After a failure it may wait for a collective, a thread or a
    # worker that does not return, and a finished run has been seen to abort in it.
    os._exit(status)


def _report(error: BaseException, rank: int) -> tuple[str, int]:
    """Print the error. Return what the other ranks do not know yet, and the exit status."""
    if isinstance(error, ValueError | DivergedError):
        return _report_input(error, rank)
    is_lost = isinstance(error, RuntimeError) and is_lost_peer(error)
    is_memory = isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)
    if isinstance(error, EndedBySignal) and error.status == INTERRUPTED:
        if rank == 0:
            _print_error(str(error))
        return "", error.status  # every rank gets a Ctrl-C, or hears of it from its launcher
    failure = failure_of(error)
    if "--debug" in sys.argv or (failure.is_bug and not is_lost and not is_memory):
        traceback.print_exc()
    if is_lost:
        return "", _report_lost_peer(error, rank)
    if is_memory:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        text = (
            f"not enough memory ({one_line(str(error))}); "
            "python launch/plan.py says what a rank needs, and on how many it fits"
            + (", and --device cpu uses this machine's memory" if on_gpu else "")
        )
        _print_error(f"rank {rank}: {text}")
        return text, 1
    _print_error(f"rank {rank}: {failure.text}" if failure.is_bug else failure.text)
    return failure.text, failure.status


def _report_input(error: ValueError | DivergedError, rank: int) -> tuple[str, int]:
    """Print an error of the input or of the numbers, once where all ranks have met it."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    text = one_line(str(error))
    on_all_ranks = isinstance(error, AgreedError | DivergedError) or not is_initialized()
    if not on_all_ranks:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        _print_error(text if alone else f"rank {rank}: {text}")
    elif rank == 0:
        _print_error(text)
    if rank != 0:
        time.sleep(_LINGER_S)
    return "" if on_all_ranks else text, 2 if isinstance(error, ValueError) else 1


def _report_lost_peer(error: BaseException, rank: int) -> int:
    """Print that another rank is gone, unless its end has been reported; return the exit status."""
    if isinstance(error, LostPeerError):
        _print_error(str(error))
    elif loss := lost_rank(_VERDICT_S):
        return loss.status
    else:
        text = f"rank {rank} lost contact with another rank ({one_line(str(error))})"
        _print_error(f"{text}; start the same command again")
    return 1


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def rank_parser(name: str, description: str) -> Parser:
    """Return a parser with the options of a command that runs on ranks and takes no config."""
    parser = Parser(prog=program(name), description=description)
    parser.hide("interface")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--interface",
        default="",
        metavar="NAME",
        help="network interface; default: loopback on one machine",
    )
    # the deepspeed launcher adds this one
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser
