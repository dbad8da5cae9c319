"""An ensemble on disk: which models rank together, and with which weights (ranking/scoring.py).

A folder with one file, `ensemble.json`, names the members:

    format_version  vocabulary_sha256  n_items  members: [{run, checkpoint, weight}, ...]
    header_sha256

`run` is a run directory or an exported folder, relative to the ensemble's folder. `checkpoint` is
"" for its best, else its newest. The members stay where they are, and all of them are held at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from dist_vasp.checkpoint.header import ModelHeader
from dist_vasp.checkpoint.json_header import JsonHeader, header_sha256, is_count, read_header
from dist_vasp.checkpoint.read import Checkpoint
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config
from dist_vasp.data.items import ItemTable
from dist_vasp.data.positives import PositiveRule
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.load import (
    ENSEMBLE,
    LoadedModel,
    load_model,
    open_model,
    positives_of,
    refuse_ratings,
    rule_of_rank_0,
)
from dist_vasp.ranking.scoring import Ensemble, Model

MOST_MEMBERS = 64
_LARGEST = 3e38  # weight; scores are float32


@dataclass(frozen=True)
class Member:
    """One model of an ensemble."""

    run: str  # relative to the ensemble's folder
    checkpoint: str  # a folder under run/checkpoints; "": the best, else the newest
    weight: float


@dataclass(frozen=True)
class EnsembleHeader(JsonHeader):
    """The content of `ensemble.json`."""

    FILE = ENSEMBLE
    VERSIONS = (1,)
    FIX_HEADER = "write the ensemble again"

    vocabulary_sha256: str
    n_items: int
    members: tuple[Member, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        if not is_count(raw["n_items"]) or not isinstance(raw["vocabulary_sha256"], str):
            raise TypeError("n_items or vocabulary_sha256 is of another kind")
        members = raw["members"]
        if not isinstance(members, list) or not members:
            raise TypeError("members is not a list of models")
        if len(members) > MOST_MEMBERS:
            raise ValueError(f"it has {len(members):,} members, expected at most {MOST_MEMBERS}")
        typed = tuple(_member(member) for member in members)
        return cls(raw["vocabulary_sha256"], raw["n_items"], typed)

    def to_json(self) -> dict[str, Any]:
        content = {"format_version": self.VERSIONS[-1], **asdict(self)}
        return content | {"header_sha256": header_sha256(content)}


def _member(raw: dict[str, Any]) -> Member:
    member = Member(**raw)
    if not isinstance(member.run, str) or not isinstance(member.checkpoint, str):
        raise TypeError("run and checkpoint of a member are text")
    if type(member.weight) not in (int, float) or not 0 < member.weight <= _LARGEST:
        raise ValueError("the weight of a member is not a number above 0")
    return member


@dataclass(frozen=True)
class Ranker:
    """What lists are made with: one loaded model, or the members of an ensemble.

    positives: the rule of the training data, None where it is not known.
    """

    name: str
    members: tuple[LoadedModel, ...]
    model: Model
    positives: PositiveRule | None

    @property
    def config(self) -> Config:
        """Of the first member: which data it was trained on, and how recall is counted."""
        return self.members[0].config

    @property
    def items(self) -> ItemTable:
        return self.members[0].items


@dataclass(frozen=True)
class OpenMembers:
    """The open checkpoints of an ensemble's members.

    runs, opened, weights: of each member. positives: their common rule, None where none knows it.
    """

    runs: tuple[Path, ...]
    opened: tuple[Checkpoint[ModelHeader], ...]
    weights: tuple[float, ...]
    positives: PositiveRule | None


def load_ranker(folder: str | Path, checkpoint: str | None, ranks: Ranks) -> Ranker:
    """The model of a run or of an exported folder, or all those of an ensemble.

    Of a run: `checkpoint`, else its best, else its newest. Raises AgreedError where there is none,
    a file of it is damaged, or an ensemble's member has another vocabulary by now.
    """
    folder = Path(folder)
    if not is_ensemble(folder):
        loaded = load_model(folder, checkpoint, ranks)
        name = f"{folder}, {loaded.checkpoint.name}"
        return Ranker(name, (loaded,), loaded.model, loaded.positives)
    with agreed(ranks):
        header = _header_of(folder, checkpoint)
        rule = _open_all(folder, header).positives
    rule = rule_of_rank_0(rule, ranks)
    loaded_members: list[LoadedModel] = []
    for member in header.members:
        run = folder / member.run
        loaded = load_model(run, member.checkpoint or None, ranks)
        with agreed(ranks):  # it may have been replaced since
            expected = header.vocabulary_sha256
            _check_vocabulary(run, loaded.checkpoint.header, expected, str(folder / ENSEMBLE))
        loaded_members.append(loaded)
    models = tuple(loaded.model for loaded in loaded_members)
    model = Ensemble(models, tuple(member.weight for member in header.members))
    return Ranker(f"{folder}, {len(models)} members", tuple(loaded_members), model, rule)


def open_members(folder: str | Path, checkpoint: str | None) -> OpenMembers:
    """Open every member of an ensemble.

    ValueError where a member is not there, or has another vocabulary by now.
    """
    return _open_all(Path(folder), _header_of(Path(folder), checkpoint))


def _header_of(folder: Path, checkpoint: str | None) -> EnsembleHeader:
    if checkpoint is not None:
        raise ValueError(
            f"{folder} is an ensemble and has no checkpoint {checkpoint}; leave --checkpoint out"
        )
    return read_ensemble(folder)


def _open_all(folder: Path, header: EnsembleHeader) -> OpenMembers:
    runs = tuple(folder / member.run for member in header.members)
    names = [member.checkpoint or None for member in header.members]
    opened = tuple(open_model(run, name) for run, name in zip(runs, names, strict=True))
    rules: dict[str, PositiveRule | None] = {}
    for run, one in zip(runs, opened, strict=True):
        _check_vocabulary(run, one.header, header.vocabulary_sha256, str(folder / ENSEMBLE))
        refuse_ratings(from_dict(one.header.config), run)
        rules[str(run)] = positives_of(one)
    weights = tuple(member.weight for member in header.members)
    return OpenMembers(runs, opened, weights, _common_rule(rules))


def is_ensemble(folder: str | Path) -> bool:
    return os.path.isfile(Path(folder) / ENSEMBLE)


def read_ensemble(folder: str | Path) -> EnsembleHeader:
    """Return the header of an ensemble; ValueError if it is damaged or of another version."""
    try:
        return read_header(EnsembleHeader, Path(folder))
    except OSError as error:
        raise ValueError(
            f"{Path(folder) / ENSEMBLE} cannot be read ({error.strerror}); "
            f"{EnsembleHeader.FIX_HEADER}"
        ) from None


def describe_ensemble(
    folder: str | Path, runs: Sequence[str | Path], weights: Sequence[float]
) -> str:
    """The text of `ensemble.json` in `folder`, with the runs as members: each stands for its best
    checkpoint at the time of use.

    weights: one for each run. ValueError unless all runs have a model, of one vocabulary.
    """
    if len(runs) != len(weights):
        raise ValueError(
            f"{len(weights)} weights were given for {len(runs)} members; give one for each, in "
            "the same order"
        )
    if len(runs) > MOST_MEMBERS:
        raise ValueError(
            f"{len(runs)} members were given, expected at most {MOST_MEMBERS}; all of them are "
            "held in memory to rank"
        )
    if not all(0 < weight <= _LARGEST for weight in weights):
        raise ValueError(
            f"the weights are {list(weights)}, expected finite numbers above 0; a member without "
            "weight is left out"
        )
    opened = [open_model(run) for run in runs]
    for run, one in zip(runs, opened, strict=True):
        refuse_ratings(from_dict(one.header.config), run)
    first = opened[0].header
    for run, one in zip(runs[1:], opened[1:], strict=True):
        _check_vocabulary(run, one.header, first.vocabulary_sha256, str(runs[0]))
    _common_rule({str(run): positives_of(one) for run, one in zip(runs, opened, strict=True)})
    members = tuple(
        Member(os.path.relpath(run, folder), "", float(weight))
        for run, weight in zip(runs, weights, strict=True)
    )
    header = EnsembleHeader(first.vocabulary_sha256, first.n_items, members)
    return json.dumps(header.to_json(), indent=1) + "\n"


def _common_rule(rules: dict[str, PositiveRule | None]) -> PositiveRule | None:
    """The rule of the members, by their folders; members that do not know theirs follow the others.

    ValueError where two differ.
    """
    known = {run: rule for run, rule in rules.items() if rule is not None}
    if not known:
        return None
    first, rule = next(iter(known.items()))
    for run, other in known.items():
        if not other.same_meaning(rule):
            raise ValueError(
                f"{run} was trained on other positives than {first} ({other}; {rule}); the "
                "members of an ensemble must be "
                "trained on the same shards"
            )
    return rule


def _check_vocabulary(run: str | Path, header: ModelHeader, expected: str, of: str) -> None:
    found = header.vocabulary_sha256
    if found != expected:
        raise ValueError(
            f"{run} has a vocabulary with hash {found[:12]}..., {of} one with {expected[:12]}...; "
            "the members of an ensemble must be trained on the same shards"
        )
