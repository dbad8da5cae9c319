"""Names of ranking metrics: a metric and a length of list, such as `ndcg@10`.

docs/metrics.md defines every metric; dist_vasp/ranking computes them.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

OF_TARGET = ("ndcg", "recall", "precision", "hr", "mrr", "map")  # of a user with a target
OF_LIST = ("novelty",)  # of a user with a list
OF_ALL_LISTS = ("coverage", "gini", "diversity")  # of all users together
NAMES = (*OF_TARGET, *OF_LIST, *OF_ALL_LISTS)
LONGEST_LIST = 10_000

_ABBREVIATIONS = ("ndcg", "hr", "mrr", "map")


@dataclass(frozen=True)
class Metric:
    """A metric of the first `k` items of each list."""

    name: str
    k: int

    def __str__(self) -> str:
        return f"{self.name}@{self.k}"

    @property
    def title(self) -> str:
        """Return the name for people, such as `NDCG@10`."""
        name = self.name.upper() if self.name in _ABBREVIATIONS else self.name.capitalize()
        return f"{name}@{self.k}"

    @property
    def of_target(self) -> bool:
        """Whether it compares a list with what was held out; else the list alone counts."""
        return self.name in OF_TARGET

    @property
    def of_all_lists(self) -> bool:
        """Whether it is one number for all users, without a value of each."""
        return self.name in OF_ALL_LISTS


def parse_metrics(text: str, option: str) -> tuple[Metric, ...]:
    """Return the metrics of a comma-separated list, each once; empty text gives none.

    ValueError, which begins with `option`, for a name that does not exist or a wrong length.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    return tuple(dict.fromkeys(_parse(word, option) for word in words))


def target_metric(text: str, option: str) -> Metric:
    """Return the one metric, of users with a target, that `option` names; else ValueError."""
    metrics = parse_metrics(text, option)
    if len(metrics) != 1 or not metrics[0].of_target:
        raise ValueError(
            f"{option} is {text!r:.40}, expected one metric of {', '.join(OF_TARGET)}, such as "
            "ndcg@20"
        )
    return metrics[0]


def metric_or_none(text: str) -> Metric | None:
    """Return the metric of this name; None where there is none."""
    try:
        return _parse(text, "")
    except ValueError:
        return None


def _parse(word: str, option: str) -> Metric:
    found = re.fullmatch(r"([a-z]+)@([1-9]\d*)", word)
    if not found or found[1] not in NAMES:
        name, _, k = word.partition("@")
        close = difflib.get_close_matches(name.lower(), NAMES, 1, 0.5)
        length = k if re.fullmatch(r"[1-9]\d*", k) else "10"
        hint = f"did you mean {close[0]}@{length}? " if close else ""
        raise ValueError(
            f"{option}: {word!r:.40} is not a metric; {hint}expected NAME@K, such as ndcg@10, with "
            f"NAME one of {', '.join(NAMES)}"
        )
    if len(found[2]) > 9 or int(found[2]) > LONGEST_LIST:
        raise ValueError(
            f"{option}: {word:.40} asks for lists of more than {LONGEST_LIST} items; lower K"
        )
    return Metric(found[1], int(found[2]))


DEFAULT_METRICS = parse_metrics("ndcg@100,ndcg@20,recall@20,recall@50,coverage@100", "")
_SHOWN = parse_metrics("ndcg@100,recall@20,recall@50,coverage@100", "")


def computed_metrics(asked: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """Return what an evaluation computes: the default metrics, then those asked for."""
    return tuple(dict.fromkeys((*DEFAULT_METRICS, *asked)))


def shown_metrics(asked: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """Return what an evaluation prints: the metrics asked for, or some of the default ones."""
    return asked or _SHOWN
