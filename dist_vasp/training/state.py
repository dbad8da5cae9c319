"""The state of a training between two steps: save it, resume it, and refuse what does not match."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import BestCheckpoint, Header, Position
from dist_vasp.checkpoint.read import Checkpoint, header_of, open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.checkpoint.write import Save
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.stream import TrainStream
from dist_vasp.model.kinds.ease import EaseKeys
from dist_vasp.model.kinds.puresvd import PureSvdKeys
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.training.step.engine import Trainer


@dataclass(frozen=True)
class RunState:
    """Where the run stands. The position within the data is a function of `step` alone."""

    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # of training, evaluation and saving excluded
    best: dict[str, Any] | None = None  # validation metrics of the best checkpoint
    evaluation_due: bool = False  # a stop came before the evaluation that belongs to `step`
    attempt: str = ""  # id of this start of the training
    best_checkpoint: BestCheckpoint | None = None  # whose weights `best` is of
    lost_best: bool = False  # the resumed checkpoint names a best one that is not in the folder

    def after_step(self, seconds: float) -> RunState:
        """Return the state after one more step, which took `seconds`."""
        return replace(self, step=self.step + 1, seconds=self.seconds + seconds)

    def with_best(self, metrics: dict[str, Any]) -> RunState:
        """Return the state in which this step is the best so far."""
        named = BestCheckpoint(self.step, self.attempt)
        return replace(self, best=metrics, best_checkpoint=named)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Return the steps of the whole run: the schedule's, or `run.max_steps` if that is less."""
    steps = config.epochs * steps_per_epoch
    return min(steps, config.run.max_steps) if config.run.max_steps else steps


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    save: Save
    is_best: bool


class Saver:
    """Write checkpoints in order, in the background where memory allows.

    A checkpoint is committed when every rank has written its part.
    """

    def __init__(
        self, trainer: Trainer, stream: TrainStream, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.trainer = trainer
        self.stream = stream
        self.folder = folder
        self.say = say
        self._pending: deque[_Pending] = deque()
        self._told = False

    def save(self, state: RunState) -> None:
        """Start saving everything that a resume needs, as step-XXXXXXXX; older ones beyond
        `run.keep` are removed when it is whole."""
        self._start(folders.step_path(self.folder, state.step), state, moments=True)

    def save_best(self, state: RunState) -> None:
        """Start saving the weights, as best-XXXXXXXX; `best` points at it when it is whole."""
        self._start(folders.best_path(self.folder, state.step), state, moments=False)

    def _start(self, path: Path, state: RunState, moments: bool) -> None:
        trainer = self.trainer
        try:
            pending = Save(
                path,
                self._header(state),
                trainer.item_pieces(moments),
                trainer.trunk_tensors(moments),
                trainer.ranks,
            )
        except ValueError:
            self.finish()  # what was started before may still become whole
            raise
        if not pending.write_in_background():
            if not self._told:
                self._told = True
                self.say(
                    "saving in the foreground, block by block: no memory for a copy of the state"
                )
            pending.write()
        self._pending.append(_Pending(pending, is_best=not moments))

    def keep_what_is_good(self, step: int) -> None:
        """Commit what was started, but remove the checkpoints of `step`, whose weights gave no
        finite loss."""
        void = (folders.step_path(self.folder, step), folders.best_path(self.folder, step))
        for pending in self._pending:
            if pending.save.path in void:
                pending.save.abandon()
        self._pending = deque(p for p in self._pending if p.save.path not in void)
        self.finish()
        if self.trainer.ranks.is_main:
            folders.discard(self.folder, *void)

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of all that was started."""
        return all(pending.save.written for pending in self._pending)

    def finish(self) -> None:
        """Commit everything that was started; all ranks call it together."""
        while self._pending:
            pending = self._pending.popleft()
            try:
                pending.save.commit()
            except ValueError:
                for later in self._pending:
                    later.save.abandon()
                self._pending.clear()
                raise
            if self.trainer.ranks.is_main:
                if pending.is_best:
                    folders.point_best_at(pending.save.path)
                folders.prune(self.folder, self.trainer.config.run.keep)

    def _header(self, state: RunState) -> Header:
        config, manifest = self.trainer.config, self.stream.manifest
        epoch, within = divmod(state.step, self.stream.steps_per_epoch)
        layout = asdict(self.trainer.ranks.layout) | {"zero_stage": config.parallel.zero_stage}
        return Header(
            position=Position(epoch, within, state.step),
            config=asdict(config),
            must_match=must_match(config, manifest.shards_sha256),
            **facts_of_data(config, manifest),
            layout=layout,
            optimizer=self.trainer.optimizer_scalars(),
            seconds_training=state.seconds,
            best=state.best,
            best_checkpoint=state.best_checkpoint,
            attempt=state.attempt,
            evaluation_due=state.evaluation_due,
        )


def facts_of_data(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a checkpoint's header that say what data the run was trained on."""
    beside = config.data.shards and config.run.dir
    return {
        "n_items": manifest.n_items,
        "vocabulary_sha256": manifest.vocabulary_sha256,
        "shards_sha256": manifest.shards_sha256,
        "data_sha256": manifest.data_sha256,
        "positives": manifest.positives,
        "shards_from_run": os.path.relpath(config.data.shards, config.run.dir) if beside else "",
    }


# --- resuming -------------------------------------------------------------------------------------

# Keys that may change when a training by steps is resumed: the first ones decide its start alone
_FREE_OF_MODEL = tuple(key.name for keys in (EaseKeys, PureSvdKeys) for key in fields(keys))
_FREE_OF_OPTIMIZER = ("schedule", "accumulation")


def must_match(config: Config, shards_sha256: str) -> dict[str, Any]:
    """Return what a resumed training may not change."""
    model, optimizer = asdict(config.model), asdict(config.optimizer)
    return {
        **{f"model.{k}": v for k, v in model.items() if k not in _FREE_OF_MODEL},
        **{f"loss.{k}": v for k, v in asdict(config.loss).items()},
        **{f"optimizer.{k}": v for k, v in optimizer.items() if k not in _FREE_OF_OPTIMIZER},
        "data.batch_size": config.data.batch_size,
        "data.halves": config.halves,
        "data.input_dropout": config.data.input_dropout,
        "data.ratings": config.data.ratings,
        "parallel.lanes": config.parallel.lanes,
        "run.seed": config.run.seed,
        "run.best_by": config.run.best_by,
        "hash of data.shards": shards_sha256,
    }


def resume(trainer: Trainer, stream: TrainStream, folder: Path, ranks: Ranks) -> RunState | None:
    """Load the newest checkpoint of `folder` into `trainer`; None where there is none.

    AgreedError where it is damaged, or names what has changed that may not.
    """
    opened = folders.open_together(lambda: newest_checkpoint(folder), open_checkpoint, ranks)
    if opened is None:
        return None
    with agreed(ranks):
        _check_same_run(trainer.config, stream, opened)
    verify(opened, ranks)
    with agreed(ranks):
        tensors = load_weights(opened, trainer.item_pieces(True), trainer.trunk_shapes())
    trainer.load_trunk(tensors)
    epoch = max(opened.step - 1, 0) // stream.steps_per_epoch
    trainer.load_scalars(opened.header.optimizer, epoch)
    opened.close()
    return _state_of(opened, folder, ranks)


def newest_checkpoint(folder: Path) -> Checkpoint[Header] | None:
    """Open the newest step checkpoint of a folder; None where there is none."""
    path = folders.newest(folder)
    return None if path is None else folders.open_named(path)


def _state_of(opened: Checkpoint[Header], folder: Path, ranks: Ranks) -> RunState:
    """Return where the run stood at a checkpoint. The best metrics count only if the best
    checkpoint is still there."""
    header = opened.header
    state = RunState(opened.step, header.seconds_training, header.best, header.evaluation_due)
    if state.best is None:
        return state
    path = folders.best_of(folder, header) if ranks.is_main else None
    best = header_of(path) if path else None
    mine = f"{best.position.step} {best.attempt}" if best else ""
    said = all_gather_bytes(mine.encode(), ranks.world, ranks.device)[0].decode()
    step, _, attempt = said.partition(" ")
    if not step:
        return replace(state, best=None, lost_best=True)
    return replace(state, best_checkpoint=BestCheckpoint(int(step), attempt))


def check_same(opened: Checkpoint[Header], matching: dict[str, Any], manifest: Manifest) -> None:
    """Raise ValueError that names what of `matching`, or of the data, is not what the checkpoint
    was written with."""
    # A key that the version did not have which wrote the checkpoint counts as its default.
    free = {f"model.{name}": getattr(Config().model, name) for name in _FREE_OF_MODEL}
    free |= {f"search.{name}": values for name, values in asdict(Config().search).items()}
    before = free | must_match(Config(), "") | opened.header.must_match
    now = json.loads(json.dumps(matching))
    different = [key for key in now if before.get(key) != now[key]]
    if "model.kind" in different:
        different = ["model.kind"]  # other kinds have other keys
    if different:
        changes = "; ".join(
            f"{key} was {_short(before.get(key))} and is now {_short(now[key])}"
            for key in different
        )
        raise ValueError(
            f"{opened.path} cannot be resumed: {changes}; set it back, or start a new run.dir"
        )
    if opened.header.data_sha256 not in ("", manifest.data_sha256):
        raise ValueError(
            f"{opened.path} cannot be resumed: the validation or test users of data.shards are "
            "others than it began with; restore the shards, or start a new run.dir"
        )


def _short(value: Any) -> str:
    """Return a value as a message shows it; a hash is cut short."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _check_same_run(config: Config, stream: TrainStream, opened: Checkpoint[Header]) -> None:
    check_same(opened, must_match(config, stream.manifest.shards_sha256), stream.manifest)
    last = total_steps(config, stream.steps_per_epoch)
    if opened.step > last:
        raise ValueError(
            f"{opened.path} is at step {opened.step}, beyond the {last} steps asked for; "
            "lengthen optimizer.schedule or run.max_steps, or start a new run.dir"
        )
