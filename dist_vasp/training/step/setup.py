"""Training by steps, before there are weights: check, describe, build, resume."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.extras import require_library
from dist_vasp.model.build import measure_size
from dist_vasp.model.kinds.nease import CLOSED_FORM
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.batches import Batches, make_stream
from dist_vasp.training.checks import check_memory
from dist_vasp.training.closed_form.ease import check_named_closed_form, start_from_ease
from dist_vasp.training.closed_form.support import SupportFit
from dist_vasp.training.grow import initialise_from, open_source
from dist_vasp.training.run import Run
from dist_vasp.training.state import RunState, resume, total_steps
from dist_vasp.training.step.engine import Trainer
from dist_vasp.training.step.fit import StepFit
from dist_vasp.training.trained_users import Users, check_held_out, read_trained_users


class StepSetup:
    """Training by steps, before there are weights; see `FitSetup`."""

    def __init__(
        self, config: Config, ranks: Ranks, init_from: str | None, allow_leak: bool = False
    ) -> None:
        self.stream = make_stream(config, ranks)
        self.manifest = self.stream.manifest
        self.keep = config.run.keep
        self.last = total_steps(config, self.stream.steps_per_epoch)
        self._config = config
        self.ranks, self.device = ranks, ranks.device
        self.folders: tuple[tuple[str, Manifest], ...] = ((config.data.shards, self.manifest),)
        self._init_from = init_from
        self._allow_leak = allow_leak
        self.earlier_users: Users | None = None
        self._remark = ""

    def check(self) -> None:
        n_ranks = self.ranks.world_size
        if n_ranks > 1 and measure_size(self._config, self.stream.n_items).trunk:
            require_library("deepspeed", f"training on {n_ranks} ranks")
        check_memory(self._config, self.stream.n_items, self.ranks)
        is_new = folders.newest_step(Path(self._config.run.dir) / "checkpoints") == 0
        if is_new:
            check_named_closed_form(self._config, self.manifest)
        if self._init_from:
            source = open_source(self._init_from, self._config.model)
            source.close()
            if is_new:
                self._check_leak(self._init_from, source.header)

    def _check_leak(self, run: str, header: Header) -> None:
        """Raise ValueError where the weights of `run` have seen users that are held out now."""
        self.earlier_users = read_trained_users(run, header)
        data = self._config.data.shards, self.manifest
        self._remark = check_held_out(run, header, self.earlier_users, *data, self._allow_leak)

    def describe(self) -> str:
        config, stream, layout = self._config, self.stream, self.ranks.layout
        model, n_items = config.model, stream.n_items
        item_bytes = 12 if config.optimizer.item_state == "full" else 8
        size = measure_size(config, n_items)
        item_gb = (size.trained * item_bytes + size.frozen * 4) / 1e9
        trunk_gb = size.trunk * 12 / 1e9
        return (
            f"{model.kind}, {stream.n_users:,} training users, {n_items:,} items, "
            f"{self.last:,} steps of about {config.data.batch_size} users "
            f"({stream.steps_per_epoch:,} an epoch)\n"
            f"weights and moments: item matrices {item_gb:.2f} GB, "
            f"{item_gb / layout.partitions:.2f} GB on each of {layout.partitions} partitions; "
            f"trunk about {trunk_gb:.2f} GB over {layout.world_size} ranks"
        )

    def start(self, run: Run) -> StepFit:
        """Build the trainer and load the newest checkpoint, if there is one."""
        with ExitStack() as undo:
            # The loader's workers read the first batches while the model is built.
            first = folders.newest_step(run.checkpoints)
            batches = self._batches(first)
            undo.callback(lambda: batches.close())
            trainer = Trainer(run.config, self.stream.n_items, run.ranks)
            state = resume(trainer, self.stream, run.checkpoints, run.ranks)
            if state is None:
                state = RunState()
                self._initialise(trainer)
                if self._remark:
                    run.say(self._remark)
            if state.step != first:
                # Somebody has renamed the checkpoint.
                batches.close()
                batches = self._batches(state.step)
            undo.pop_all()
            return StepFit(run, self.stream, trainer, state, batches)

    def _batches(self, first: int) -> Batches:
        return self.stream.batches(first, self.last, self._config.data.workers)

    def _initialise(self, trainer: Trainer) -> None:
        """Give a new run the weights that it starts from, where it starts from some."""
        on_support: SupportFit | None = None
        has_inputs = self._config.model.init_from_ease not in ("", CLOSED_FORM)  # of another run
        for matrix in trainer.model.matrices:
            if isinstance(matrix, NeighbourMatrix) and not has_inputs:
                on_support = SupportFit(self._config, self.manifest, self.ranks)
                on_support.choose(matrix)
        if self._config.model.init_from_ease:
            start_from_ease(trainer, self.manifest, on_support)
        if self._init_from:
            initialise_from(trainer, self._init_from, self._config.data.shards)
