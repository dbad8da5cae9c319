"""The ensembles of a comparison's file: their members, weights, and how weights are fitted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dist_vasp.compare.config import Model
from dist_vasp.config.metric_names import target_metric


def members_of(
    raw: Any, where: str, seeds: tuple[int, ...], above: Sequence[Model]
) -> tuple[tuple[str, float | None], ...]:
    """Return (model, weight) of each member: trained models above the ensemble; weight None where
    the weights are fitted.

    They have as many seeds as the ensemble, or one alone.
    """
    trained = {model.name: model.seeds for model in above if model.config}
    fitted = isinstance(raw, list)
    if not isinstance(raw, dict | list) or not raw:
        raise ValueError(
            f"{where} is {raw!r:.80}, expected models and their weights, such as "
            "{vasp: 1, ease: 4}, or models alone, such as [vasp, ease]; set it"
        )
    if fitted and not all(isinstance(name, str) for name in raw):
        raise ValueError(f"{where} is {raw!r:.80}, expected names of models")
    if fitted and len(set(raw)) < len(raw):
        raise ValueError(f"{where} is {raw!r:.80}: a model is named twice; name it once")
    weights: dict[str, Any] = dict.fromkeys(raw) if fitted else dict(raw)
    for name, weight in weights.items():
        if name not in trained:
            raise ValueError(
                f"{where}: {name!r:.80} is not a trained model above it; expected some of "
                f"{', '.join(trained) or 'none'}"
            )
        if not fitted and (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 < weight < math.inf
        ):
            raise ValueError(
                f"{where}.{name} is {weight!r:.80}, expected a weight above 0; leave out a member "
                "without weight"
            )
        if 1 < len(trained[name]) < len(seeds):
            raise ValueError(
                f"{where}: {name} has {len(trained[name])} seeds, the ensemble {len(seeds)}; give "
                "both as many"
            )
    return tuple(
        (name, None if weight is None else float(weight)) for name, weight in weights.items()
    )


def fit_of(entry: dict[str, Any], where: str) -> str:
    """The metric that an ensemble's weights are fitted by, "" where it names none."""
    fit = entry.get("fit", "")
    if fit == "":
        return ""
    if not isinstance(entry.get("ensemble"), list):
        raise ValueError(
            f"{where}.fit is {fit!r:.80}, expected it beside a list of models in ensemble, whose "
            "weights are fitted; leave it out"
        )
    if not isinstance(fit, str):
        raise ValueError(f"{where}.fit is {fit!r:.80}, expected a metric such as ndcg@20")
    return str(target_metric(fit, f"{where}.fit"))
