"""What every launch script does around its work: exit statuses, one readable message per error,
quiet ranks.

Exit status 0: done; 2: bad input or configuration; 128 + N: ended by signal N (a training saves
instead, and exits with 0); 1: anything else. Rank 0 alone prints, except for an error that only
another rank has met.
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

from data_tools.cli import Parser
from dist_vasp.console import final_status, guard
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
from dist_vasp.places import path_error
from dist_vasp.signals import EndedBySignal, ending_on_signals
from dist_vasp.text import one_line
from dist_vasp.training.engine import DivergedError

_VERDICT_S = 3.0  # a collective may fail a little before the lost rank is known
_PATIENCE_S = 5.0  # between a signal and the end of a command that does not save
_LINGER_S = (
    1.0  # the launcher ends all ranks when the first one exits: rank 0 must have spoken by then
)


def run(main: Callable[[Sequence[str] | None], int | None]) -> NoReturn:
    """Call `main(argv)` and exit with its status; a ValueError is a user's error, a DivergedError a
    failed run."""
    guard()
    warnings.filterwarnings("ignore", category=FutureWarning)
    failed = ""  # what this rank alone has met
    rank = 0
    try:
        with ending_on_signals(_PATIENCE_S):
            found, world = launched_world()[:2]
            if world > 1:
                meeting_point(world)
            # from here on rank 0 speaks for all; what is wrong with its own environment, each rank
            # says
            rank = found
            status = main(None) or 0
    except EndedBySignal as ended:
        print(f"error: {ended}", file=sys.stderr, flush=True)
        failed, status = str(ended), ended.status
    except (ValueError, DivergedError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        everywhere = isinstance(error, AgreedError | DivergedError) or not is_initialized()
        if rank == 0 or not everywhere:
            where = (
                "" if everywhere or os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {rank}: "
            )
            print(f"error: {where}{one_line(str(error))}", file=sys.stderr, flush=True)
        failed = "" if everywhere else one_line(str(error))
        if rank != 0:
            time.sleep(_LINGER_S)
        status = 2 if isinstance(error, ValueError) else 1
    except Exception as error:
        status = 1
        lost_peer = isinstance(error, RuntimeError) and is_lost_peer(error)
        no_memory = isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ) or "can't allocate memory" in str(error)
        of_a_path = path_error(error)
        if "--debug" in sys.argv or not (lost_peer or no_memory or of_a_path):
            traceback.print_exc()
        if of_a_path:
            failed, status = one_line(of_a_path), 2
            print(f"error: {failed}", file=sys.stderr, flush=True)
        elif no_memory:
            failed = f"not enough memory ({one_line(str(error))}); python launch/plan.py says what a rank needs, and on how many it fits"
            print(f"error: rank {rank}: {failed}", file=sys.stderr, flush=True)
        elif not lost_peer:
            failed = f"{type(error).__name__}: {one_line(str(error))}"
            print(f"error: rank {rank}: {failed}", file=sys.stderr, flush=True)
        elif isinstance(error, LostPeerError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif loss := lost_rank(_VERDICT_S):
            status = loss.status
        else:
            text = f"rank {rank} lost contact with another rank ({one_line(str(error))}); start the same command again"
            print(f"error: {text}", file=sys.stderr, flush=True)
    status = final_status(status)
    leave(failed, status)
    if status == 0:
        shut_down()
    sys.stderr.flush()
    # All is said and written. After a failure nothing may wait for a collective, a thread or a
    # worker that will not come. And one finished run among some hundreds was seen to abort on its
    # way out ("terminate called"): the interpreter's end is left out.
    os._exit(status)


def make_argument_parser(prog: str, description: str) -> Parser:
    """A parser with what every launch script without a config takes."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--interface",
        default="",
        metavar="NAME",
        help="network interface; default: loopback on one machine",
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    return parser
