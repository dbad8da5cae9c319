"""The header of a stored model: what its weights are, and everything that a reader needs to know.

A folder of weights holds one header beside its safetensors files: `checkpoint.json` of a checkpoint
(`Header`) or `export.json` of an export (ranking/export.py). A header carries the SHA-256 of every
file and of its own content. Nothing of it is used before `from_json` has checked it.

`item_axis` says for each tensor of the items files along which axis it is cut into items:

    0   rows are items: input.weight (J, H), output.decoder.weight (J, H), a bias (J,)
    1   columns are items: an item-to-item matrix (I, J), whose rows are items too

Moments have the axis of their weight, also where they are smaller than it. Tensors of the trunk
have no item axis and are not listed.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Self

from dist_vasp.checkpoint.json_header import JsonHeader, header_sha256, is_count, is_number
from dist_vasp.data import positives
from dist_vasp.data.positives import PositiveRule

TRUNK = "trunk.safetensors"
ITEMS = "items-"  # the beginning of the name of an items file
MOST_FILES = 1 << 14  # one for each partition
_WEIGHTS_FILE = re.compile(r"trunk\.safetensors|items-\d{5}-of-\d{5}\.safetensors")
_ATTEMPT = re.compile(r"[0-9a-f]{0,32}")


def items_file(index: int, partitions: int) -> str:
    """Return the name of the items file of a partition."""
    return f"{ITEMS}{index:05d}-of-{partitions:05d}.safetensors"


# --- what every stored model says -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelHeader(JsonHeader):
    """What a reader of weights needs, whether they lie in a checkpoint or in an export."""

    FIX_FILE: ClassVar[str]
    """What to do about a damaged file that the header lists."""

    n_items: int
    vocabulary_sha256: str
    config: dict[str, Any]
    """The configuration as it was written; `dist_vasp.config.command_line.from_dict` reads it."""
    positives: PositiveRule | None = None
    """The rule that made the positives of the training data; None where it is not known."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file, by name."""
    item_axis: dict[str, int] | None = None
    """Axis of the items in each tensor of the items files; None in format 1."""
    header_sha256: str = ""
    """SHA-256 of the header's own content; "" before it is written."""

    def axis_of(self, name: str) -> int:
        """Return the item axis of a tensor; ValueError where the header does not list it."""
        if self.item_axis is None:
            return _axis_in_format_1(name)
        if name not in self.item_axis:
            raise ValueError(f"item_axis of {self.FILE} does not list {name}")
        return self.item_axis[name]

    def items_files(self) -> list[str]:
        """Return the names of the items files, in the order of their items."""
        return sorted(name for name in self.files if name.startswith(ITEMS))

    def to_json(self) -> dict[str, Any]:
        content = {"format_version": self.VERSIONS[-1], **self._content()}
        content["files"] = dict(sorted(self.files.items()))
        return content | {"header_sha256": header_sha256(content)}

    def _content(self) -> dict[str, Any]:
        content = {
            "n_items": self.n_items,
            "vocabulary_sha256": self.vocabulary_sha256,
            "config": self.config,
            **positives.for_header(self.positives),
        }
        return content if self.item_axis is None else content | {"item_axis": self.item_axis}


def _axis_in_format_1(name: str) -> int:
    """Format 1 had one name for the item-to-item matrix of NEASE and EASE, and named no axis."""
    matrix = "output.nease.weight"
    return 1 if name == matrix or name.startswith(f"{matrix}.") else 0


def common_fields(raw: dict[str, Any], file: re.Pattern[str], place: str) -> dict[str, Any]:
    """Return the checked fields of ModelHeader from the JSON of a header.

    `file` matches the names of files that may be listed; `place` names the folder in messages.
    """
    if not is_count(raw["n_items"]):
        raise TypeError("n_items is not a whole number")
    if not isinstance(raw["vocabulary_sha256"], str):
        raise TypeError("vocabulary_sha256 is not text")
    if not isinstance(raw["config"], dict):
        raise TypeError("config is not a table")
    if len(raw["files"]) > MOST_FILES:
        n = len(raw["files"])
        raise ValueError(f"files lists {n:,} files, expected at most {MOST_FILES:,}")
    for name, digest in raw["files"].items():
        if not file.fullmatch(name) or not isinstance(digest, str):
            raise ValueError(f"files lists {name!r}, which is no file of {place}")
    axes = raw.get("item_axis")
    if axes is not None and not all(type(axis) is int and axis in (0, 1) for axis in axes.values()):
        raise ValueError("item_axis holds something else than 0 and 1")
    return {
        "n_items": raw["n_items"],
        "vocabulary_sha256": raw["vocabulary_sha256"],
        "config": raw["config"],
        "positives": positives.in_header(raw),
        "files": raw["files"],
        "item_axis": axes,
        "header_sha256": raw["header_sha256"],
    }


# --- what a checkpoint says -----------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """How far training has come. Epochs and the steps within one count from 0.

    `step` is the number of updates made.
    """

    epoch: int
    step_in_epoch: int
    step: int


@dataclass(frozen=True)
class BestCheckpoint:
    """Which best checkpoint belongs to a step checkpoint."""

    step: int
    attempt: str  # id of the start of the training that wrote it; "" in earlier versions


@dataclass(frozen=True, kw_only=True)
class Header(ModelHeader):
    """`checkpoint.json`: what a run needs to resume, beside what every stored model says."""

    FILE = "checkpoint.json"
    VERSIONS = (1, 2)
    FIX_HEADER = "use another checkpoint of the run"
    FIX_FILE = "remove this checkpoint and resume from another"

    position: Position
    must_match: dict[str, Any]
    """What a resumed run may not change."""
    shards_sha256: str
    data_sha256: str = ""
    """Hash of all the data, evaluation users included; "" in earlier versions."""
    shards_from_run: str = ""
    """The path of the shards relative to the run's folder; "" in earlier versions."""
    layout: dict[str, int] = field(default_factory=dict)
    optimizer: dict[str, float]
    """Scalar state of the optimizers: `step` and `mu_product`; and `paths_step` and
    `paths_mu_product` where the paths were updated in other steps than the encoder."""
    seconds_training: float = 0.0
    ease_lambda: float | None = None
    """The closed form's lambda; None in a run that is trained by steps."""
    best: dict[str, Any] | None = None
    """Validation metrics of the best checkpoint so far."""
    best_checkpoint: BestCheckpoint | None = None
    names_best: bool = True
    """False in a checkpoint of an earlier version, which does not name its best one."""
    attempt: str = ""
    """Id of the start of the training that wrote the checkpoint."""
    evaluation_due: bool = False
    """Whether the evaluation that belongs to this step is still to be made."""

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        if raw["format_version"] > 1:
            raw["item_axis"]  # may be missing in format 1 alone
        if not isinstance(raw["config"], dict) or not isinstance(raw["must_match"], dict):
            raise TypeError("config or must_match is not a table")
        for key in ("shards_sha256", "data_sha256", "shards_from_run"):
            if not isinstance(raw[key] if key == "shards_sha256" else raw.get(key, ""), str):
                raise TypeError(f"{key} is not text")
        named = raw.get("best_checkpoint")
        attempt = raw.get("attempt", "")
        due = raw.get("evaluation_due", False)
        if not isinstance(due, bool) or not _ATTEMPT.fullmatch(attempt):
            raise ValueError("evaluation_due or attempt is of another kind")
        return cls(
            **common_fields(raw, _WEIGHTS_FILE, "a checkpoint"),
            position=_position(raw["position"]),
            must_match=raw["must_match"],
            shards_sha256=raw["shards_sha256"],
            data_sha256=raw.get("data_sha256", ""),
            shards_from_run=raw.get("shards_from_run", ""),
            layout=raw.get("layout", {}),
            optimizer=_scalars(raw["optimizer"]),
            seconds_training=_number(raw.get("seconds_training", 0.0), "seconds_training"),
            ease_lambda=_number(raw["ease_lambda"], "ease_lambda")
            if "ease_lambda" in raw
            else None,
            best=_metrics(raw.get("best")),
            best_checkpoint=None if named is None else _best_checkpoint(named),
            names_best="best_checkpoint" in raw,
            attempt=attempt,
            evaluation_due=due,
        )

    def _content(self) -> dict[str, Any]:
        named = self.best_checkpoint
        content = {
            "position": asdict(self.position),
            **super()._content(),
            "must_match": self.must_match,
            "shards_sha256": self.shards_sha256,
            "data_sha256": self.data_sha256,
            "shards_from_run": self.shards_from_run,
            "layout": self.layout,
            "optimizer": self.optimizer,
            "seconds_training": self.seconds_training,
            "best": self.best,
            "best_checkpoint": None if named is None else asdict(named),
            "attempt": self.attempt,
            "evaluation_due": self.evaluation_due,
        }
        return content if self.ease_lambda is None else content | {"ease_lambda": self.ease_lambda}


def _position(raw: dict[str, Any]) -> Position:
    position = Position(raw["epoch"], raw["step_in_epoch"], raw["step"])
    if not all(is_count(value) for value in asdict(position).values()):
        raise TypeError("position does not hold three whole numbers")
    return position


def _best_checkpoint(raw: dict[str, Any]) -> BestCheckpoint:
    found = BestCheckpoint(raw["step"], raw["attempt"])
    if not is_count(found.step) or not _ATTEMPT.fullmatch(found.attempt):
        raise ValueError("best_checkpoint is of another kind")
    return found


def _scalars(raw: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for of in ("", "paths_") if "paths_step" in raw else ("",):
        step, mu_product = raw[f"{of}step"], raw[f"{of}mu_product"]
        if not is_number(step) or step != int(step) or not is_number(mu_product) or mu_product > 1:
            raise ValueError(f"optimizer is at step {step!r} with mu_product {mu_product!r}")
        found |= {f"{of}step": step, f"{of}mu_product": mu_product}
    return found


def _metrics(raw: dict[str, Any] | None) -> dict[str, Any] | None:
    if raw is not None and not all(value is None or is_number(value) for value in raw.values()):
        raise TypeError("best does not hold metrics")
    return raw


def _number(value: Any, name: str) -> float:
    if not is_number(value):
        raise TypeError(f"{name} is not a number")
    return value
