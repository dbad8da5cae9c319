"""The settings of a closed form that a run tries on validation: a grid, walked by lambda.

The lists of the section `search` are combined, the last one fastest. For each combination, lambda
goes from large to small until the validation metric has fallen twice in a row; a kind without
lambda has one setting for each. A setting has its number in that order, so a run that stopped knows
from metrics.jsonl which ones it has tried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import parse_json
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.model.registry import kind_of

GRID = tuple(10.0 * 2**k for k in range(9, -1, -1))  # of lambda: 5120 to 10
PATIENCE = 2  # lambdas in a row that may be worse than the best before a walk ends
_LONGEST_LINE = 1 << 20  # of metrics.jsonl; a longer one is none of ours


@dataclass(frozen=True)
class Candidate:
    """One setting: the model's keys, and its number among all settings, from 1."""

    step: int
    model: ModelConfig
    searched: tuple[str, ...]
    """Names of the keys that the settings differ in, except `walked`."""
    walked: str = ""
    """The key that goes from large to small; "" where there is none."""

    @property
    def values(self) -> dict[str, float]:
        """The value of every searched key and of the one that is walked."""
        names = (self.walked, *self.searched) if self.walked else self.searched
        return {name: getattr(self.model, name) for name in names}

    def __str__(self) -> str:
        named = [(name.split("_", 1)[1].replace("_", " "), v) for name, v in self.values.items()]
        return ", ".join(f"{name} {value:g}" for name, value in named) or "the given setting"


def walks_of(config: Config) -> list[list[Candidate]]:
    """Return the settings that may be tried, a list for each combination of keys but lambda."""
    model, search = config.model, config.search
    closed_form = kind_of(model.kind).closed_form
    walked = closed_form.walked if closed_form else ""
    lists = search.lists
    steps: list[dict[str, Any]] = [{}]
    if walked:
        given = getattr(model, walked)
        values = lists.pop(walked) or ([given] if given else GRID)
        steps = [{walked: value} for value in sorted(values, reverse=True)]
    searched = tuple(name for name, values in lists.items() if values)
    walks: list[list[Candidate]] = []
    for combination in product(*(lists[name] for name in searched)):
        chosen = dict(zip(searched, combination, strict=True))
        first = len(walks) * len(steps) + 1
        walks.append(
            [
                Candidate(first + k, replace(model, **step, **chosen), searched, walked)
                for k, step in enumerate(steps)
            ]
        )
    return walks


def n_settings(config: Config) -> int:
    """Return how many settings may be tried."""
    return sum(len(walk) for walk in walks_of(config))


def largest(config: Config) -> Config:
    """Return the configuration with the setting that takes the most memory and time."""
    sizes = kind_of(config.model.kind).size_keys
    models = [walk[0].model for walk in walks_of(config)]
    return replace(config, model=max(models, key=lambda m: [getattr(m, name) for name in sizes]))


def no_validation(config: Config) -> str:
    """Return the message for a search without validation users."""
    lists = config.search.lists
    which = next((f"search.{name}" for name, values in lists.items() if len(values) > 1), "")
    why = f"{which} is {lists[which[7:]]}" if which else "model.ease_lambda is 0"
    actions = ["leave search out"] if which else []
    if walks_of(config)[0][0].walked:
        actions.append("set model.ease_lambda")
    return (
        f"{why}, so it is to be chosen on validation, but {config.data.shards} has no validation "
        "user with a target; "
        f"{', '.join(actions)}, or prepare the data with some"
    )


@dataclass(frozen=True)
class Tried:
    """What is known of a setting that was tried."""

    value: float
    """Of the validation metric that decides."""
    seconds: float


def read_tried(path: Path, best_by: str, best_step: int, best_value: float) -> dict[int, Tried]:
    """Return the settings in metrics.jsonl by their number; damaged lines are left out.

    best_step, best_value: of the checkpoint. Lines from the first better setting on, whose weights
    were not saved, do not count.
    """
    tried: dict[int, Tried] = {}
    try:
        with open(path, "rb") as handle:
            while line := handle.readline(_LONGEST_LINE):
                tried |= _tried_in(line, best_by)
    except OSError:
        return {}
    unsaved = [s for s in tried if s > best_step and tried[s].value > best_value]
    return {step: one for step, one in tried.items() if step < min(unsaved, default=step + 1)}


def _tried_in(line: bytes, best_by: str) -> dict[int, Tried]:
    """The setting that a line evaluates by its number; empty for any other line."""
    try:
        record = parse_json(line.decode())
    except ValueError:
        return {}
    if not isinstance(record, dict) or record.get("split") != "validation":
        return {}
    step, value, seconds = (record.get(name) for name in ("step", best_by, "seconds"))
    if type(step) is not int or type(value) is not float or type(seconds) is not float:
        return {}
    return {step: Tried(value, seconds)}
