"""The card of an exported model: what it was trained on, how it was tested, and what it is not for.

It is Markdown for people, made of the headers and of what the run left beside its checkpoints.
What is not at hand is said to be unknown. Nothing of it is read to make lists.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import read_json
from dist_vasp.checkpoint.header import Header, ModelHeader
from dist_vasp.checkpoint.read import Checkpoint
from dist_vasp.config.metric_names import metric_or_none
from dist_vasp.data.items import ItemTable
from dist_vasp.data.manifest import MANIFEST, Manifest
from dist_vasp.data.positives import PositiveRule
from dist_vasp.model.registry import KINDS
from dist_vasp.text import one_line

MODEL_CARD = "MODEL_CARD.md"
UNKNOWN = "not known where this was exported"
_LONGEST = 300  # of a text that a file gives
_KEYS = {
    "model": ("kind", "hidden", "latent", "encoder_layers", "decoder_layers", "neighbours"),
    "loss": ("kind", "alpha", "gamma"),
    "optimizer": ("name", "schedule"),
    "data": ("batch_size",),
}  # of the configuration of a model that is trained by steps
_OF_RUN = ("seed", "best_by", "recall_denominator")
Metrics = Mapping[str, Mapping[str, Any]]  # by split


@dataclass(frozen=True)
class Origin:
    """The name of the checkpoint behind an export, and its validation metrics where known."""

    checkpoint: str
    validation: dict[str, Any] | None


def model_card(
    opened: Checkpoint[ModelHeader], origin: Origin, items: ItemTable, rule: PositiveRule | None
) -> str:
    """Return the card of one model."""
    header, run_dir = opened.header, opened.path.parent.parent
    is_run = isinstance(header, Header)
    manifest = find_manifest(header, run_dir) if isinstance(header, Header) else None
    result = _object(run_dir / "result.json") if is_run else {}
    if result.get("checkpoint") != opened.name:
        result = {}  # it speaks of another checkpoint
    start = _last_start(run_dir) if is_run else {}
    model = header.config.get("model", {})
    kind = model.get("kind", "model")
    data = [*_data(header, items, manifest), f"- Positives: {_rule(rule)}."]
    if value := model.get("ease_auxiliary"):
        data.append(
            "- Besides, weaker interactions of the training users from a second data folder: each "
            f"counts {value:g} of a positive."
        )
    parts = [
        [
            f"# Model card: {text(kind)}",
            "",
            "Top-N recommendations from a user's history of items.",
        ],
        ["## Training data", "", *data],
        ["## Metrics", "", *_tested(result, origin.validation)],
        ["## Training", "", *_training(header, result, start, origin.checkpoint)],
        [*limits(), f"- {MODEL_CARD} is checked with the weights: put your notes elsewhere."],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def ensemble_card(
    members: Sequence[tuple[str, str, float]],
    items: ItemTable,
    rule: PositiveRule | None,
    evaluation: Metrics,
) -> str:
    """Return the card of an ensemble. members: folder, kind and weight of each."""
    rows = [f"| {text(name)} | {text(kind)} | {weight:g} |" for name, kind, weight in members]
    data = [f"- {len(items.keys):,} items.", f"- Positives: {_rule(rule)}."]
    told = f"The metrics of the ensemble itself are {UNKNOWN}; `evaluate --json` measures them."
    score = "The score of an item is the sum over the members of weight times score."
    head = ["| folder | model | weight |", "|---|---|---|"]
    parts = [
        [f"# Model card: ensemble of {len(members)} models", "", score],
        ["## Members", "", "Each folder has a card of its own.", "", *head, *rows],
        ["## Training data", "", *data],
        ["## Metrics", "", *(_table(evaluation) if evaluation else [told])],
        limits(),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def evaluation_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what `evaluate --json` wrote into an ensemble's folder, or beside it, by split."""
    found: dict[str, dict[str, Any]] = {}
    for path in _evaluation_files(folder):
        metrics = _object(path)
        if metrics and set(metrics) <= {"test", "validation"}:
            found |= {split: one for split, one in metrics.items() if isinstance(one, dict)}
    return found


def _evaluation_files(folder: Path) -> list[Path]:
    """Return the files that may hold the evaluation of an ensemble."""
    beside = folder.resolve()
    return [*sorted(folder.glob("*.json")), beside.with_name(f"{beside.name}.test.json")]


def find_manifest(header: Header, run_dir: Path) -> Manifest | None:
    """Return the manifest of the shards that a run was trained on; None where they are gone or
    were prepared again."""
    named = str(header.config.get("data", {}).get("shards") or "")
    for folder in (named, os.path.normpath(run_dir / (header.shards_from_run or named))):
        if not named or not (Path(folder) / MANIFEST).is_file():
            continue
        try:
            manifest = Manifest.load(folder)
        except ValueError:
            continue
        if header.data_sha256 in ("", manifest.data_sha256) and (
            manifest.vocabulary_sha256 == header.vocabulary_sha256
        ):
            return manifest
    return None


def _data(header: ModelHeader, items: ItemTable, manifest: Manifest | None) -> list[str]:
    n_interactions = int(items.popularity.sum())
    lines = [f"- {header.n_items:,} items with {n_interactions:,} training interactions."]
    lines.append(f"- Vocabulary: SHA-256 {text(header.vocabulary_sha256)}.")
    if manifest is None:
        return [*lines, f"- Users and protocol are {UNKNOWN}: the shards were not at hand."]
    made = manifest.preparation
    for name, split in manifest.splits.items():
        held_out = f" and {split.heldout:,} held out" if split.heldout else ""
        lines.append(
            f"- {name}: {split.users:,} users, {split.interactions:,} interactions{held_out}."
        )
    protocol, arguments = made.get("protocol"), made.get("arguments")
    lines.append(f"- Protocol: {text(protocol or 'not known')}.")
    if isinstance(arguments, dict):
        told = ", ".join(f"{text(key)} {text(value)}" for key, value in arguments.items())
        lines.append(f"- Options of the preparation: {told}.")
    return lines


def _rule(rule: PositiveRule | None) -> str:
    return UNKNOWN if rule is None else text(str(rule).removeprefix("positives: "))


def _tested(result: dict[str, Any], validation: dict[str, Any] | None) -> list[str]:
    found = {s: result[s] for s in ("test", "validation") if isinstance(result.get(s), dict)}
    if not found and validation:
        found = {"validation": validation}
    return _table(found) if found else [f"The metrics of this checkpoint are {UNKNOWN}."]


def _table(splits: Metrics) -> list[str]:
    """Return metrics as a table, a column for each split."""
    names = dict.fromkeys(key for metrics in splits.values() for key in metrics)
    shown = {key: metric.title for key in names if (metric := metric_or_none(str(key)))}
    rows = [
        [title, *(_value(metrics, key) for metrics in splits.values())]
        for key, title in shown.items()
    ]
    users = ["users", *(_count(metrics.get("n_users")) for metrics in splits.values())]
    lines = [["metric", *splits], ["---"] * (1 + len(splits)), *rows, users]
    note = "Means over users, with one standard error. What is seen is left out of the lists."
    return [*("| " + " | ".join(line) + " |" for line in lines), "", note]


def _value(metrics: Mapping[str, Any], key: str) -> str:
    value, error = metrics.get(key), metrics.get(f"{key}_se")
    if not _is_number(value):
        return "-"
    return f"{value:.4f} +- {error:.4f}" if _is_number(error) else f"{value:.4f}"


def _count(value: Any) -> str:
    return f"{value:,.0f}" if _is_number(value) else "-"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _training(
    header: ModelHeader, result: dict[str, Any], start: dict[str, Any], name: str
) -> list[str]:
    keys = [f"{name} {_setting(value)}" for name, value in _configuration(header.config)]
    lines = [f"- Configuration: {', '.join(keys)}.", f"- Checkpoint: {text(name)}."]
    if _is_number(result.get("seconds_training")):
        epochs = f"{_count(result.get('epochs'))} epoch{'s' * (result.get('epochs') != 1)}"
        lines.append(f"- Time: {result['seconds_training']:,.0f} s of training, {epochs}.")
    versions = start.get("versions")
    if isinstance(versions, dict):
        told = ", ".join(f"{text(k)} {text(v)}" for k, v in versions.items() if v is not None)
        lines.append(f"- Software: Python {text(start.get('python', '?'))}, {told}.")
    else:
        lines.append(f"- Software: {UNKNOWN}.")
    for label, key in (("Commit", "commit"), ("Device", "device")):
        if start.get(key):
            lines.append(f"- {label}: {text(start[key])}.")
    return lines


def _configuration(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys that had a part in the model, with their values."""
    model = config.get("model") or {}
    kind = KINDS.get(str(model.get("kind")))
    names: Mapping[str, Sequence[str]] = _KEYS
    if kind is not None and kind.closed_form:
        names = {"model": [key for key in ("kind", *kind.closed_form.keys) if model.get(key)]}
    for section, of_section in {**names, "run": _OF_RUN}.items():
        part = config.get(section) or {}
        for key in of_section:
            if part.get(key) is not None:
                yield f"{section}.{key}", part[key]


def _setting(value: Any) -> str:
    """Return a value of the configuration; a schedule as epochs and learning rates."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return text(", ".join(f"{v.get('epochs')} epochs at {v.get('lr')}" for v in value))
    return text(value)


def limits() -> list[str]:
    """Return what every model of this project cannot do."""
    return [
        "## Limits",
        "",
        "- Only items of the vocabulary are recommended. New items need a new training.",
        "- A user without a known item gets no list of the model's own, at most the popular items.",
        "- The metrics are of held-out items of one data set and one split: they measure what users"
        " took, not what they would have liked. One run says nothing about other seeds.",
        "- Items that were shown often have more interactions; the model repeats that.",
        "- Scores order the items of one user. They are not comparable between users.",
        "- The export holds item ids, titles and counts, and no user. The weights of rare items may"
        " reveal who took them.",
    ]


def text(value: Any) -> str:
    """Return a value of a file as one line of Markdown in which nothing is markup."""
    line = one_line(str(value))[:_LONGEST].replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*_|\[\]]", r"\\\g<0>", line)


def _object(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_start(run_dir: Path) -> dict[str, Any]:
    starts = _object(run_dir / "environment.json").get("starts")
    last = starts[-1] if isinstance(starts, list) and starts else {}
    return last if isinstance(last, dict) else {}
