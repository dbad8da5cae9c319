"""The scalar state of the optimizers, as a checkpoint holds it.

`step` and `mu_product` are those of the encoder: input side and trunk. Where the paths were updated
in other steps, theirs are `paths_step` and `paths_mu_product`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dist_vasp.training.step.optimizer import SCALARS

State = dict[str, Any]
PATHS = "paths_"


def scalars_of(encoder: State, path: State) -> dict[str, float]:
    """The scalars, given the state of a parameter of each; the same one where there is no other."""
    scalars = {name: float(encoder[name]) for name in SCALARS}
    of_paths = {f"{PATHS}{name}": float(path[name]) for name in SCALARS}
    return scalars if [*scalars.values()] == [*of_paths.values()] else scalars | of_paths


def restore_scalars(
    scalars: Mapping[str, float], encoder: Iterable[State], paths: Iterable[State]
) -> None:
    """Write what `scalars_of` gave into the states of all parameters."""
    for prefix, states in (("", encoder), (PATHS, paths)):
        for state in states:
            for name in SCALARS:
                state[name].fill_(scalars.get(prefix + name, scalars[name]))
