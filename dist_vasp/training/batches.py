"""The batches of a run, as its configuration asks for them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from functools import partial

from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.stream import Batch, StreamOptions, TrainStream
from dist_vasp.data.workers import ReadAhead
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.comm import Ranks

Batches = Generator[Batch, None, None] | ReadAhead[Batch]


def make_stream(config: Config, ranks: Ranks) -> TrainStream:
    """Return the part of the stream of `config` that this rank reads; ValueError where the shards
    do not fit."""
    data = config.data
    options = StreamOptions(
        data.batch_size,
        config.parallel.lanes,
        config.run.seed,
        config.halves,
        data.input_dropout,
        config.ratings,
        partial(_drops_inputs, config.model),
    )
    return TrainStream(data.shards, options, ranks.rank, ranks.world_size)


def _drops_inputs(model: ModelConfig, epoch: int) -> bool:
    """Whether the inputs of an epoch have dropout: those of a phase that trains the encoder."""
    return kind_of(model.kind).phase(model, epoch).encoder


def with_next(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Yield each batch together with the one after it, None after the last."""
    iterator = iter(batches)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch, following
        batch = following
