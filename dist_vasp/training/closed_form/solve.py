"""What writes the weights of a setting into a model: EASE and its relatives with all inputs or K of
them, or singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from dist_vasp.config.schema import ModelConfig
from dist_vasp.model.ease import Gpu
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.paths import ItemMatrix
from dist_vasp.parallel.agree import agreed
from dist_vasp.training.closed_form.auxiliary import Auxiliary, Overlap
from dist_vasp.training.closed_form.ease import fit
from dist_vasp.training.closed_form.parts import parts_folder
from dist_vasp.training.closed_form.support import SupportFit
from dist_vasp.training.closed_form.svd import SvdFit
from dist_vasp.training.run import Run


def solver_of(
    model: PartitionedModel,
    width: int,
    run: Run,
    resumed: Callable[[float], None],
    overlap: Overlap | None = None,
    gpu: Gpu | None = None,
) -> Callable[[ModelConfig], None]:
    """What writes the weights of a setting into `model`, after what all settings share.

    width: items of a block of the model. resumed: is told the seconds that earlier starts took for
    what is resumed. overlap: of `data.auxiliary`. gpu: what computes the exact matrix where it is
    on the host (through_host.py).
    """
    config, manifest, ranks, interrupted = run.config, run.manifest, run.ranks, run.interrupted
    if not model.matrices:
        return partial(SvdFit(config, manifest, ranks, interrupted, run.say).solve, model)
    (matrix,) = model.matrices
    if isinstance(matrix, NeighbourMatrix):
        parts = parts_folder(config.run.dir)
        on_support = SupportFit(config, manifest, ranks, interrupted, parts)
        resumed(on_support.choose(matrix))
        return lambda keys: resumed(on_support.solve(matrix, keys))
    assert isinstance(matrix, ItemMatrix)
    columns = matrix.columns()
    auxiliary: Auxiliary | None = None
    if overlap is not None:
        with agreed(ranks):
            auxiliary = Auxiliary(overlap, ranks.is_main)
        run.say(auxiliary.told())

    def solve(keys: ModelConfig) -> None:
        of_setting = replace(config, model=keys)
        show = ranks.is_main
        fit(columns, width, of_setting, manifest, ranks, show, interrupted, auxiliary, gpu)

    return solve
