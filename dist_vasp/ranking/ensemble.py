"""Several trained models that rank together: score = sum over members of weight * (log p, or x B of
ease).

VASP's own product (arXiv 2102.05774, section 3.3) with more factors: in log space every member adds
its log p, and an item is listed where all agree. A weight is the exponent of its member's p. A
folder with one file, `ensemble.json`, names the members:

    format_version  vocabulary_sha256  n_items  members: [{run, checkpoint, weight}, ...]  header_sha256

`run` is a run directory or an exported folder, relative to the ensemble's folder; `checkpoint` is "" for its best, else its newest.
The members stay where they are, and all of them are held at once, each partitioned as it was trained.

Shapes: G rows of the partition group, C columns of a block.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dist_vasp.checkpoint.header import ModelHeader
from dist_vasp.checkpoint.json_header import JsonHeader, header_sha256, is_count, read_header
from dist_vasp.config import Config
from dist_vasp.data.items import ItemTable
from dist_vasp.data.positives import PositiveRule
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import Scorer, model_scorer
from dist_vasp.ranking.load import (
    ENSEMBLE,
    LoadedModel,
    load_model,
    open_model,
    positives_of,
    same_on_all,
)

MOST_MEMBERS = 64
_LARGEST = 1e300  # weight; a longer number of JSON is no float


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
    """What lists are made with: one loaded model, or the members of an ensemble."""

    name: str
    members: tuple[LoadedModel, ...]
    weights: tuple[float, ...]
    positives: PositiveRule | None  # None: not known

    @property
    def alone(self) -> LoadedModel | None:
        """The one model; None for an ensemble."""
        return self.members[0] if not self.weights else None

    @property
    def config(self) -> Config:
        """Of the first member: which data it was trained on, and how recall is counted."""
        return self.members[0].config

    @property
    def items(self) -> ItemTable:
        return self.members[0].items

    @property
    def probabilities(self) -> bool:
        """Whether a score is log p of a model; else it is ranked by as it stands."""
        return self.alone is not None and not self.config.model.linear

    def scorer(self) -> Scorer:
        scorers = [model_scorer(member.model, member.trunk) for member in self.members]
        return weighted_sum(scorers, self.weights) if self.weights else scorers[0]


def weighted_sum(scorers: Sequence[Scorer], weights: Sequence[float]) -> Scorer:
    """The scorer whose score is the sum of the others' times their weights; all must cut the items
    into the same blocks."""

    def score(x: ItemRows) -> Iterator[tuple[int, Tensor]]:
        for blocks in zip(*(scorer(x) for scorer in scorers), strict=True):
            first = blocks[0][0]
            total_GC = blocks[0][1].mul_(weights[0])
            for (lo, scores_GC), weight in zip(blocks[1:], weights[1:], strict=True):
                assert lo == first, (lo, first)
                total_GC.add_(scores_GC, alpha=weight)
            yield first, total_GC

    return score


def load_ranker(folder: str | Path, checkpoint: str | None, ranks: Ranks) -> Ranker:
    """The model of a run (`checkpoint`, else its best, else its newest) or of an exported folder,
    or all those of an ensemble.

    Raises AgreedError where there is none, a file of it is damaged, or an ensemble's member has
    another vocabulary by now.
    """
    folder = Path(folder)
    if not is_ensemble(folder):
        loaded = load_model(folder, checkpoint, ranks)
        return Ranker(f"{folder}, {loaded.checkpoint.name}", (loaded,), (), loaded.positives)
    with agreed(ranks):
        if checkpoint is not None:
            raise ValueError(
                f"{folder} is an ensemble and has no checkpoint {checkpoint}; leave --checkpoint out"
            )
        header = read_ensemble(folder)
        members = header.members
        rules: dict[str, PositiveRule | None] = {}
        for member in members:
            run = folder / member.run
            opened = open_model(run, member.checkpoint or None)
            _check_vocabulary(run, opened.header, header.vocabulary_sha256, str(folder / ENSEMBLE))
            rules[str(run)] = positives_of(opened)
        rule = _common_rule(rules)
    rule = same_on_all(rule, ranks)
    loaded_members: list[LoadedModel] = []
    for member in members:
        blocks = loaded_members[0].config.parallel.block_columns if loaded_members else None
        loaded = load_model(folder / member.run, member.checkpoint or None, ranks, blocks)
        with agreed(ranks):  # it may have been replaced since
            _check_vocabulary(
                folder / member.run,
                loaded.checkpoint.header,
                header.vocabulary_sha256,
                str(folder / ENSEMBLE),
            )
        loaded_members.append(loaded)
    return Ranker(
        f"{folder}, {len(members)} members",
        tuple(loaded_members),
        tuple(member.weight for member in members),
        rule,
    )


def is_ensemble(folder: str | Path) -> bool:
    return (Path(folder) / ENSEMBLE).is_file()


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
            f"{len(weights)} weights were given for {len(runs)} members; give one for each, in the same order"
        )
    if len(runs) > MOST_MEMBERS:
        raise ValueError(
            f"{len(runs)} members were given, expected at most {MOST_MEMBERS}; all of them are held in memory to rank"
        )
    if not all(0 < weight <= _LARGEST for weight in weights):
        raise ValueError(
            f"the weights are {list(weights)}, expected finite numbers above 0; a member without weight is left out"
        )
    opened = [open_model(run) for run in runs]
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
                f"{run} was trained on other positives than {first} ({other}; {rule}); the members of an ensemble must be "
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
