"""The files that a Recommender answers from: one checkpoint or export, or those of an ensemble.

The item matrices are mapped (ranking/mapped.py), so loading costs one reading of the files for
their checksums and no memory of their size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_vasp.checkpoint.header import ModelHeader
from dist_vasp.checkpoint.read import Checkpoint
from dist_vasp.checkpoint.read import verify as verify_files
from dist_vasp.checkpoint.weights import check_numbers
from dist_vasp.config.command_line import from_dict
from dist_vasp.data.items import ItemTable, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE
from dist_vasp.data.positives import PositiveRule
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.ensemble import is_ensemble, open_members
from dist_vasp.ranking.load import check_size, open_model, positives_of, refuse_ratings
from dist_vasp.ranking.mapped import map_model
from dist_vasp.ranking.scoring import Ensemble, Model, TrainedModel

Stamps = dict[str, tuple[int, int]]  # size and time of change of each file


@dataclass(frozen=True)
class Source:
    """One checkpoint or export, its files mapped."""

    opened: Checkpoint[ModelHeader]
    items_file: Path
    kind: str
    model: TrainedModel
    stamps: Stamps

    def check_unchanged(self) -> None:
        """Raise ValueError where a mapped file was written to.

        A file that was replaced or removed stays readable; one that was changed does not.
        """
        for name, stamp in stamps_of(self.opened).items():
            if stamp != self.stamps[name]:
                raise ValueError(
                    f"{self.opened.path / name} was changed while the model was in use; load it "
                    "again, and never write into the files of a model: write a new folder"
                )


@dataclass(frozen=True)
class Sources:
    """What a Recommender answers from: the model, its vocabulary, and the files of its members."""

    folder: Path
    members: tuple[Source, ...]
    model: Model
    items: ItemTable
    positives: PositiveRule | None

    @property
    def kind(self) -> str:
        """For messages."""
        return "ensemble" if isinstance(self.model, Ensemble) else self.members[0].kind

    @property
    def sha256(self) -> str:
        """Return the hash of the model's header; of an ensemble, of all headers and weights."""
        headers = [member.opened.header.header_sha256 for member in self.members]
        if not isinstance(self.model, Ensemble):
            return headers[0]
        return hashlib.sha256(repr((headers, self.model.weights)).encode()).hexdigest()

    def check_unchanged(self) -> None:
        for member in self.members:
            member.check_unchanged()


def stamps_of(opened: Checkpoint[ModelHeader]) -> Stamps:
    """Size and time of change of every open file."""
    found = {name: os.fstat(handle.fileno()) for name, handle in opened.handles.items()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def open_sources(folder: str | Path, checkpoint: str | None, verify: bool) -> Sources:
    """Open a run, an export or an ensemble; ValueError where it holds no model or is damaged."""
    if isinstance(folder, str | os.PathLike) and is_ensemble(folder):
        members = open_members(folder, checkpoint)
        pairs = zip(members.opened, members.runs, strict=True)
        sources = tuple(_open(opened, run, verify) for opened, run in pairs)
        models = tuple(source.model for source in sources)
        model: Model = Ensemble(models, members.weights)
        rule = members.positives
    else:
        opened = open_model(folder, checkpoint)
        sources = (_open(opened, Path(folder), verify),)
        model, rule = sources[0].model, positives_of(opened)
    header = sources[0].opened.header
    items = read_items_file(sources[0].items_file, header.n_items, header.vocabulary_sha256)
    return Sources(Path(folder), sources, model, items, rule)


def _open(opened: Checkpoint[ModelHeader], folder: Path, verify: bool) -> Source:
    if verify:
        verify_files(opened, form_groups(0, Layout(1, 1, 1), torch.device("cpu")))
    config = from_dict(opened.header.config)
    refuse_ratings(config, opened.path)
    check_size(opened, config)
    model = map_model(opened, config)
    if verify:
        check_numbers(opened, _tensors(model))
    # Absolute, so that `export` finds it after a change of folder.
    items_file = folder.absolute() / ITEMS_FILE
    return Source(opened, items_file, config.model.kind, model, stamps_of(opened))


def _tensors(model: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    if isinstance(model.trunk, torch.nn.Module):
        yield from model.trunk.named_parameters()
    for piece in model.model.slices():
        yield piece.name, piece.tensor
