"""A training run and its folder, whichever way the model is fitted.

training/train.py tells the run from start to end. The two ways to fit are `FitSetup`s: by steps
(step/fit.py) and in closed form (closed_form/fit.py). A setup knows the data before there are
weights; `start` builds the model, resumes it and returns the `Fit`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from dist_vasp.checkpoint import folder as folders
from dist_vasp.config.metric_names import computed_metrics
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.extras import how_to_install
from dist_vasp.parallel.agree import agreed, any_rank
from dist_vasp.parallel.comm import Ranks
from dist_vasp.progress import Progress, say
from dist_vasp.ranking.evaluate import Scorer, evaluate
from dist_vasp.ranking.metrics import RankingMetrics
from dist_vasp.training.environment import describe
from dist_vasp.training.events import EventFile
from dist_vasp.training.run_dir import REMEDY, RunDir
from dist_vasp.training.stop import StopRequest
from dist_vasp.training.trained_users import FILE as TRAINED_USERS
from dist_vasp.training.trained_users import Users, write_trained_users


@dataclass(frozen=True)
class Past:
    """What a start of a run finds in its folder."""

    after_step: int = 0
    """Lines of metrics.jsonl up to this step are kept."""
    evaluation_due: bool = False
    """Whether the evaluation of this step is still to be made."""
    best: Path | None = None
    """The best checkpoint."""
    result_of: str | None = ""
    """header_sha256 of the checkpoint that result.json may speak of; None: whatever it says."""
    remarks: tuple[str, ...] = ()
    """What to tell the user."""


@dataclass(frozen=True)
class Fitted:
    """What a finished fit leaves: the checkpoint to evaluate, and what result.json says of it."""

    checkpoint: str
    seconds: float
    epochs: float
    stopped: str
    """What to say where a stop is requested before the last evaluation has ended."""
    facts: dict[str, Any] = field(default_factory=dict)


class Fit(Protocol):
    """A model that is built, resumed and about to be fitted."""

    def past(self) -> Past: ...

    def opening(self) -> str:
        """Return one line: what is fitted, on what, from where."""

    def fit(self) -> Fitted | None:
        """Fit to the end; None where a stop was requested, after saving."""

    def stopped(self) -> str:
        """Return the line that tells where the fit stopped."""

    def close(self) -> None: ...


class FitSetup(Protocol):
    """A way to fit, before there are weights."""

    manifest: Manifest
    folders: tuple[tuple[str, Manifest], ...]
    """The data folders that are read, `data.shards` first."""
    ranks: Ranks
    """On the device that holds the model."""
    device: torch.device
    """That computes the model."""
    keep: int
    """Step checkpoints that are kept."""
    earlier_users: Users | None
    """Users that the weights which a new run starts from have seen."""

    def check(self) -> None:
        """Raise ValueError where the fit cannot be made."""

    def describe(self) -> str:
        """Return the lines of a dry run: what would be fitted, in which memory."""

    def start(self, run: Run) -> Fit: ...


class Run:
    """One start of a run: what both ways to fit need. `run_dir` is rank 0's, None on the others."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        manifest: Manifest,
        run_dir: RunDir | None,
        stop: StopRequest,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.manifest = manifest
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self._run_dir = run_dir
        self._stop = stop

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._stop.requested

    def interrupted(self) -> bool:
        """Whether any rank was asked to stop. All ranks call it together."""
        return any_rank(self._stop.requested, self.ranks)

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.ranks.is_main:
            say(text)

    def begin(self, fit: Fit, setup: FitSetup) -> None:
        """Make the folder hold the past of `fit` and nothing beyond it, and open the metrics."""
        environment = describe(self.ranks, setup.device)
        if self._run_dir is None:
            return
        past = fit.past()
        folders.settle(self.checkpoints, past.best)
        folders.prune(self.checkpoints, setup.keep)
        if past.result_of is not None:
            self._run_dir.drop_result(unless=past.result_of)
        n_damaged = self._run_dir.open(
            self.config, self.manifest, past.after_step, environment, past.evaluation_due
        )
        if n_damaged:
            self.say(
                f"{n_damaged} damaged lines of metrics.jsonl are kept in metrics.damaged.jsonl"
            )
        for remark in past.remarks:
            self.say(remark)
        if not EventFile.is_possible():
            self.say(
                f"no curves for TensorBoard, which is missing: {how_to_install('tensorboard')}"
            )
        if past.after_step == 0 or not (self._run_dir.folder / TRAINED_USERS).exists():
            self._note_users(self._run_dir, setup.earlier_users)

    def _note_users(self, run_dir: RunDir, earlier: Users | None) -> None:
        """Write the users of training into the folder; a data folder without their list is said."""
        try:
            users = Users.of_split(self.config.data.shards, "train", self.manifest)
        except ValueError as error:
            self.say(f"{run_dir.folder / TRAINED_USERS} is not written: {error}")
            return
        if earlier is not None:
            users = users.and_(earlier)
        write_trained_users(run_dir.folder, users, REMEDY)

    def record(self, line: dict[str, Any], prefix: str) -> None:
        """Write one line of metrics on rank 0."""
        if self._run_dir:
            self._run_dir.record(line, prefix)

    def write_file(self, name: str, text: str) -> Path:
        """Write a file into the run's folder on rank 0; return its path on every rank."""
        path = Path(self.config.run.dir) / name
        if self._run_dir:
            self._run_dir.write(name, text)
        return path

    def evaluate(self, scorer: Scorer, split: str) -> RankingMetrics | None:
        """Evaluate on the shards that the run began with; None where a stop was requested.

        AgreedError where the shards were replaced.
        """
        shards, manifest = self.config.data.shards, self.manifest
        check_same_shards(shards, manifest, self.ranks)
        users = manifest.splits[split].users
        title = f"evaluating {split}"
        with Progress(title, users, "user", show=self.ranks.is_main, brief=True) as progress:
            return evaluate(
                scorer,
                shards,
                split,
                self.ranks,
                progress.update,
                interrupted=self.interrupted,
                recall_denominator=self.config.run.recall_denominator,
                manifest=manifest,
                metrics=computed_metrics(self.config.run.asked_metrics),
                ratings=self.config.ratings,
            )

    def end(self, result: dict[str, Any] | None) -> None:
        """Write result.json, unless the run was stopped, and close the folder."""
        if self._run_dir:
            if result:
                self._run_dir.write_result(result)
            self._run_dir.close()


def check_same_shards(folder: str, manifest: Manifest, ranks: Ranks) -> None:
    """Raise AgreedError where the data folder was replaced since `manifest` was read."""
    with agreed(ranks):
        if ranks.is_main and (found := Manifest.load(folder).data_sha256) != manifest.data_sha256:
            raise ValueError(
                f"data.shards {folder} was replaced while the run was going on: it began with "
                f"shards of hash {manifest.data_sha256[:12]}..., now it is {found[:12]}...; "
                "restore them, or train on the new ones in a new run.dir"
            )
