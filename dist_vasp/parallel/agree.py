"""Let all ranks agree on a flag or on an error, so that none waits for another in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dist_vasp.parallel.comm import Ranks, all_gather_bytes, all_reduce


class AgreedError(ValueError):
    """A user's error that every rank raises together, so that rank 0 alone reports it."""


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Return whether `flag` is True on any rank; all ranks call it together."""
    return bool(all_reduce(torch.tensor(float(flag), device=ranks.device), ranks.world, "max") > 0)


def agree(error: Exception | None, ranks: Ranks) -> None:
    """Raise one AgreedError on every rank if any rank passes a ValueError; all call it together."""
    if error is not None and not isinstance(error, ValueError):
        raise error
    text = "" if error is None else str(error) or type(error).__name__
    messages = [
        message.decode(errors="replace")
        for message in all_gather_bytes(text.encode(errors="replace"), ranks.world, ranks.device)
    ]
    for rank, message in enumerate(messages):
        if message:
            everywhere = all(m == message for m in messages)
            raise AgreedError(message if everywhere else f"{message} (rank {rank})") from error


@contextmanager
def agreed(ranks: Ranks) -> Iterator[None]:
    """Turn a ValueError that any rank raises in the body into one AgreedError on all ranks.

    The body must hold no collective.
    """
    error: Exception | None = None
    try:
        yield
    except ValueError as raised:
        error = raised
    agree(error, ranks)
