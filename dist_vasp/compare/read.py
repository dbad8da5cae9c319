"""Read the YAML file of a comparison. Unknown keys and wrong values are errors.

shards: DIR                   data folder that every model is trained and tested on
reference: NAME               the model that all others are paired with
seeds: [0, 1, 2]              run.seed of each run of a model
overrides: {device: cpu}      optional: section.key: value for every trained model
metrics: ndcg@10,hr@10        optional: further metrics of every model
models:
  - name: vasp                letters, digits, dot, dash, underscore
    config: configs/X.yaml    a run's configuration, or its sections in place
    overrides: {model.kind: vasp}
    seeds: [0]                optional; closed-form models and baselines take the first seed alone
  - name: popularity
    baseline: popularity      in place of config: nothing is trained
  - name: both
    ensemble: {vasp: 1, ease: 4}  in place of config: models above it and their weights; its first
                              run combines their first runs, and so on, or the only one there is;
                              [vasp, ease] fits the weights of each run on validation users
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vasp.compare.config import Comparison, Model
from dist_vasp.compare.members import fit_of, members_of
from dist_vasp.config.command_line import from_dict
from dist_vasp.config.metric_names import Metric, parse_metrics
from dist_vasp.config.shipped import find_config
from dist_vasp.config.yaml_file import read_yaml
from dist_vasp.model.registry import kind_of

BASELINES = ("popularity",)
_SOURCES = ("config", "baseline", "ensemble")
_OWN_KEYS = {
    "data.shards": "shards",
    "run.dir": "--output",
    "run.seed": "seeds",
}  # what a comparison sets itself
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_comparison(
    path: str | Path, more: Mapping[str, Any] | None = None, metrics: str = ""
) -> Comparison:
    """Return the comparison in a YAML file; ValueError says what does not fit.

    `more` overrides keys of every trained model, and `shards`; `metrics` the file's.
    """
    path = find_config(path)
    raw = _mapping(read_yaml(path, "the configuration of a comparison"), str(path))
    more = dict(more or {})
    _known(raw, ("shards", "reference", "seeds", "models", "overrides", "metrics"), str(path))
    shards = more.pop("shards", raw.get("shards"))
    if not isinstance(shards, str) or not shards:
        raise ValueError(
            f"{path}: shards is {shards!r}, expected a folder written by "
            "`python -m data_tools.shard`; set it"
        )
    seeds = _seeds(raw.get("seeds", [0]), f"{path}: seeds")
    entries = raw.get("models")
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: models is {entries!r:.80}, expected a list of models, each with a name and a "
            "config; add some"
        )
    common = _overrides(raw.get("overrides", {}), f"{path}: overrides")
    file = _File(shards, seeds, common, more)
    models: list[Model] = []
    for place, entry in enumerate(entries):
        model = _model(entry, f"{path}: models[{place}]", file, models)
        if model.name in (other.name for other in models):
            raise ValueError(
                f"{path}: models[{place}].name {model.name!r} is there twice; give each model a "
                "name of its own"
            )
        models.append(model)
    denominators = {model.config.run.recall_denominator for model in models if model.config}
    if len(denominators) > 1:
        raise ValueError(
            f"{path}: run.recall_denominator is min for some models and held_out for others; set "
            "one under overrides"
        )
    reference, names = raw.get("reference"), [model.name for model in models]
    if reference not in names:
        raise ValueError(
            f"{path}: reference is {reference!r:.80}, expected one of the models "
            f"{', '.join(names)}; name one"
        )
    asked = _metrics(raw.get("metrics", ""), f"{path}: metrics", metrics, models)
    return Comparison(str(path), shards, str(reference), seeds, tuple(models), asked)


def _metrics(raw: Any, where: str, given: str, models: Sequence[Model]) -> tuple[Metric, ...]:
    """Return the further metrics of all models: those of the file, or `given` in their place, and
    those that any model's own configuration asks for."""
    if not isinstance(raw, str):
        raise ValueError(f"{where} is {raw!r:.80}, expected text such as ndcg@10,hr@10; correct it")
    own = parse_metrics(raw, where)
    asked = parse_metrics(given, "--metrics") or own
    of_models = [m for model in models if model.config for m in model.config.run.asked_metrics]
    return tuple(dict.fromkeys((*asked, *of_models)))


@dataclass(frozen=True)
class _File:
    """What all models of a compare file have in common."""

    shards: str
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    """`overrides` of the file."""
    more: Mapping[str, Any]
    """Overrides of the command line, which win over those of a model."""


def _model(raw: Any, where: str, file: _File, above: Sequence[Model]) -> Model:
    """Return the model of one entry; `above` are those before it."""
    entry = _mapping(raw, where)
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}.name is {name!r:.80}, expected letters, digits, dots, dashes, underscores; "
            "it names files too"
        )
    where = f"{where} ({name})"
    _known(entry, (*_SOURCES, "name", "overrides", "seeds", "fit"), where)
    given = [key for key in _SOURCES if key in entry]
    if len(given) != 1:
        raise ValueError(
            f"{where} has {' and '.join(given) or 'none'} of config, baseline, ensemble; "
            "give one of the three"
        )
    own_seeds = _seeds(entry["seeds"], f"{where}.seeds") if "seeds" in entry else None
    seeds = own_seeds or file.seeds
    fit = fit_of(entry, where)
    if "baseline" in entry:
        return _baseline(entry, where, seeds)
    if "ensemble" in entry:
        if "overrides" in entry:
            raise ValueError(
                f"{where}.overrides is set, but an ensemble takes its members as they are; "
                "leave it out"
            )
        members = members_of(entry["ensemble"], f"{where}.ensemble", seeds, above)
        return Model(name, seeds, None, "ensemble", {}, members, fit)
    return _trained(entry, where, file, own_seeds)


def _baseline(entry: dict[str, Any], where: str, seeds: tuple[int, ...]) -> Model:
    if entry["baseline"] not in BASELINES:
        raise ValueError(
            f"{where}.baseline is {entry['baseline']!r}, expected {' or '.join(BASELINES)}; "
            "correct it"
        )
    if "overrides" in entry:
        raise ValueError(
            f"{where}.overrides is set, but a baseline has no configuration; leave it out"
        )
    return Model(entry["name"], seeds[:1], None, entry["baseline"], {})


def _trained(
    entry: dict[str, Any], where: str, file: _File, own_seeds: tuple[int, ...] | None
) -> Model:
    """Return a model with a configuration; a closed form takes one seed unless it names its own."""
    source = entry["config"]
    overrides = {
        **file.overrides,
        **_overrides(entry.get("overrides", {}), f"{where}.overrides"),
        **_overrides(file.more, "the command line"),
    }
    is_file = isinstance(source, str)
    if is_file:
        found = read_yaml(find_config(source), "a run's configuration")
    else:
        found = copy.deepcopy(source)
    sections = _mapping(found, f"{where}.config")
    try:
        config = from_dict(_with_overrides(sections, {**overrides, "data.shards": file.shards}))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    seeds = own_seeds or file.seeds
    if kind_of(config.model.kind).closed_form and own_seeds is None:
        seeds = seeds[:1]
    return Model(entry["name"], seeds, config, source if is_file else "inline", overrides)


def _with_overrides(sections: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(sections)
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if not name:
            merged[section] = value
            continue
        inner = merged.get(section) or {}
        if not isinstance(inner, dict):
            raise ValueError(
                f"{section} is {inner!r:.80}, expected a section of keys; write `{section}:` with "
                "its keys below"
            )
        merged[section] = {**inner, name: value}
    return merged


def _mapping(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ValueError(
            f"{where} is {raw!r:.80}, expected keys with values; see configs/compare.yaml"
        )
    return dict(raw)


def _known(raw: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in raw:
        if key not in keys:
            raise ValueError(
                f"{where}: {key!r:.80} is not a key of a comparison; expected {', '.join(keys)}"
            )


def _seeds(raw: Any, where: str) -> tuple[int, ...]:
    seeds = raw if isinstance(raw, list) else [None]
    if (
        not seeds
        or any(type(seed) is not int or seed < 0 for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise ValueError(
            f"{where} is {raw!r:.80}, expected a list of different whole numbers from 0; for "
            "instance [0, 1, 2]"
        )
    return tuple(seeds)


def _overrides(raw: Any, where: str) -> dict[str, Any]:
    found = _mapping(raw, where)
    for key in found:
        if key in _OWN_KEYS:
            raise ValueError(
                f"{where}: {key} belongs to the comparison; set {_OWN_KEYS[key]} in its place"
            )
        if "." not in key and key != "device":
            raise ValueError(
                f"{where}: {key} is not a key of the configuration; write section.key: value, such "
                "as model.kind: nease"
            )
    return found
