"""The batches of a run, as its configuration asks for them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator

from dist_vasp.config.schema import Config
from dist_vasp.data.stream import Batch, StreamOptions, TrainStream
from dist_vasp.data.workers import ReadAhead
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.comm import Ranks

Batches = Generator[Batch, None, None] | ReadAhead[Batch]


def make_stream(config: Config, ranks: Ranks) -> TrainStream:
    """Return the part of the stream of `config` that this rank reads; ValueError where the shards
    do not fit."""
    data = config.data
    phases = kind_of(config.model.kind).phases(config.model)
    options = StreamOptions(
        data.batch_size,
        config.parallel.lanes,
        config.run.seed,
        config.halves,
        data.input_dropout,
        config.ratings,
        tuple((n, phase.encoder) for n, phase in phases),
    )
    return TrainStream(data.shards, options, ranks.rank, ranks.world_size)


def with_next(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each batch together with the one after it, None after the last."""
    iterator = iter(batches)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch, following
        batch = following
