"""Fit by optimizer steps: train, evaluate at the end of epochs, keep the best, save.

A stop, an evaluation and a save happen after a step, on all ranks after the same one: what a rank
was asked, and whether its part of a checkpoint is on disk, travel with the step's loss.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.read import header_of
from dist_vasp.config.schema import ParallelConfig
from dist_vasp.data.stream import Batch, TrainStream
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import all_gather_bytes, all_gather_keys
from dist_vasp.progress import Progress, Waiting
from dist_vasp.ranking.evaluate import model_scorer
from dist_vasp.ranking.metrics import summary
from dist_vasp.training.batches import Batches, with_next
from dist_vasp.training.environment import Memory
from dist_vasp.training.run import Fitted, Past, Run
from dist_vasp.training.state import RunState, Saver, total_steps
from dist_vasp.training.step.engine import Trainer
from dist_vasp.training.step.step_report import DivergedError, StepReport


class StepFit:
    """A trainer at some step of its run; see `Fit`."""

    def __init__(
        self, run: Run, stream: TrainStream, trainer: Trainer, state: RunState, batches: Batches
    ) -> None:
        self.run = run
        self.stream = stream
        self.trainer = trainer
        self.last = total_steps(run.config, stream.steps_per_epoch)
        ranks = run.ranks
        attempt = all_gather_bytes(secrets.token_hex(8).encode(), ranks.world, ranks.device)[0]
        self.state = replace(state, attempt=attempt.decode())
        self._batches = batches
        self._saver = Saver(trainer, stream, run.checkpoints, run.say)
        self._memory = Memory(ranks.device)
        self._moved = self._bytes_moved()
        self._is_first_step = True
        show = ranks.is_main
        self._progress = Progress("training", self.last, "step", state.step, show=show)

    def close(self) -> None:
        """End the loader's workers."""
        self._progress.close()
        self._batches.close()

    # --- what is said of it -----------------------------------------------------------------------

    def past(self) -> Past:
        state, folder = self.state, self.run.checkpoints
        best = None
        if state.best_checkpoint:
            best = folders.best_path(folder, state.best_checkpoint.step)
            if not best.exists():  # a copy of the run that followed the link
                best = folder / folders.BEST
        header = header_of(folder / self._evaluated()) if self._is_done() else None
        lost = (
            "the best checkpoint of the resumed run is not in its folder; "
            "the best one is looked for from here on"
        )
        return Past(
            after_step=state.step,
            evaluation_due=state.evaluation_due,
            best=best,
            result_of=header.header_sha256 if header else "",
            remarks=(lost,) if state.lost_best else (),
        )

    def _is_done(self) -> bool:
        return self.state.step == self.last and not self.state.evaluation_due

    def _evaluated(self) -> str:
        """The name of the checkpoint that result.json speaks of: the best, else the last."""
        best, folder = self.state.best_checkpoint, self.run.checkpoints
        path = (
            folders.best_path(folder, best.step) if best else folders.step_path(folder, self.last)
        )
        return path.name

    def opening(self) -> str:
        trainer, stream, layout = self.trainer, self.stream, self.run.ranks.layout
        step, last = self.state.step, self.last
        n_items = sum(piece.tensor.numel() for piece in trainer.model.slices())
        n_trunk = trainer.trunk.n_parameters if trainer.trunk else 0
        ahead = f"steps {step + 1} to {last}" if step < last else f"all {last} steps are done"
        text = (
            f"{self.run.config.model.kind} on {stream.n_users:,} users and {stream.n_items:,} "
            f"items: {n_items / 1e6:.1f}M item parameters on this rank, {n_trunk / 1e6:.1f}M in "
            f"the trunk; {layout.partitions} partitions x {layout.replicas} replicas on "
            f"{self.run.ranks.device.type} in {trainer.precision.name}; "
            f"{ahead}, {stream.steps_per_epoch} an epoch"
        )
        text += f" (resumed from step {step})" if step else ""
        remarks = (trainer.remark, _earlier_name(self.run.config.parallel))
        return "\n".join([text, *(remark for remark in remarks if remark)])

    def stopped(self) -> str:
        return (
            f"stopped on request after step {self.state.step} of {self.last}, saved in "
            f"{self.run.checkpoints}; the same command resumes there"
        )

    # --- the loop ---------------------------------------------------------------------------------

    def fit(self) -> Fitted | None:
        if self.state.evaluation_due:
            self._evaluate()
        clock = time.monotonic()
        for batch, following in with_next(self._batches):
            waited = time.monotonic() - clock
            report = self._step(batch, following)
            elapsed = time.monotonic() - clock
            self.state = self.state.after_step(elapsed)
            self._record(batch, report, elapsed, waited)
            if report.all_written:
                self._saver.finish()
            if not self._evaluate_and_save(batch.epoch, report.stop):
                break
            # The time and the traffic of evaluating and saving are left out.
            clock = time.monotonic()
            self._moved = self._bytes_moved()
        self._saver.finish()
        if not self._is_done():
            return None
        self.trainer.close()
        epochs = self.last / self.stream.steps_per_epoch
        return Fitted(self._evaluated(), self.state.seconds, epochs, self.stopped())

    def _step(self, batch: Batch, following: Batch | None) -> StepReport:
        """One update; DivergedError names the users of the batch and the last good checkpoint."""
        try:
            with self._compiling():
                return self.trainer.step(
                    batch,
                    stop=self.run.stop_requested,
                    written=self._saver.written,
                    following=following,
                )
        except DivergedError as error:
            self._saver.keep_what_is_good(self.state.step)
            raise self._explained(error, batch) from None

    def _compiling(self) -> AbstractContextManager[object]:
        """Tell the user that the first step compiles."""
        estimate = self.trainer.seconds_to_compile if self._is_first_step else 0.0
        self._is_first_step = False
        if not estimate:
            return nullcontext()
        return Waiting("compiling the functions of a step", self.run.ranks.is_main, estimate)

    def _explained(self, error: DivergedError, batch: Batch) -> DivergedError:
        """All ranks diverge at the same step, and call this together."""
        keys = sorted(set(all_gather_keys(batch.user_keys, self.run.ranks)))
        content = {"step": batch.step + 1, "user_keys": keys}
        name = f"diverged-step-{batch.step + 1}.json"
        path = self.run.write_file(name, json.dumps(content) + "\n")
        good = folders.newest(self.run.checkpoints)
        some = ", ".join(map(str, keys[:5])) + (", ..." if len(keys) > 5 else "")
        return DivergedError(
            f"{error}; the batch holds {len(keys)} users with keys {some} (all in {path}); "
            f"the last good checkpoint is {good or 'none'}; "
            "lower the learning rate or set optimizer.clip_norm, and start again"
        )

    def _record(self, batch: Batch, report: StepReport, elapsed: float, waited: float) -> None:
        """Write the step's line of metrics.jsonl and move the bar."""
        rate = batch.global_users / elapsed
        line = {
            "step": self.state.step,
            "epoch": batch.epoch,
            "loss": report.loss,
            "focal": report.focal,
            "kl": report.kl,
            "lr": self.run.config.lr(batch.epoch),
            "grad_norm": report.grad_norm,
            "users_per_second": rate,
            "step_seconds": elapsed,
            "data_wait": waited / elapsed,
            **report.paths,
            **self._memory.now(),
            "bytes_moved": self._bytes_moved() - self._moved,
        }
        self.run.record(line, "train")
        text = f"epoch {batch.epoch}, loss {report.loss:.4f}, {rate:,.0f} users/s"
        self._progress.update(self.state.step, text)

    def _bytes_moved(self) -> int:
        return sum(self.run.ranks.bytes_moved().values())

    def _evaluate_and_save(self, epoch: int, stop: bool) -> bool:
        """Evaluate and save where this step is one to do so; return whether training continues."""
        step = self.state.step
        every = self.run.config.run.evaluate_every_epochs
        cadence = self.run.config.run.checkpoint_every_steps
        epoch_ends = step % self.stream.steps_per_epoch == 0
        is_last = step == self.last
        is_due = bool(every) and (is_last or (epoch_ends and (epoch + 1) % every == 0))
        self.state = replace(self.state, evaluation_due=is_due)
        if is_due and not stop:
            self._evaluate_or_save()
        stopping = stop or self.state.evaluation_due
        if stopping or is_last or (step % cadence == 0 if cadence else epoch_ends):
            self._saver.save(self.state)
        return not stopping

    def _evaluate_or_save(self) -> None:
        """Evaluate; where that fails, for shards that were replaced, the steps are not lost."""
        try:
            self._evaluate()
        except AgreedError as error:
            self._saver.save(self.state)
            self._saver.finish()
            raise AgreedError(
                f"{error}; saved after step {self.state.step}, and the same command resumes there"
            ) from None

    def _evaluate(self) -> None:
        """Validate this step and keep it if it is the best; it stays due where a stop comes
        first."""
        run = self.run
        metrics = None
        if run.manifest.splits["validation"].users:
            with self.trainer.evaluating() as trunk:
                found = run.evaluate(model_scorer(self.trainer.model, trunk), "validation")
            if found is None:
                return
            metrics = found.result()
        state = self.state = replace(self.state, evaluation_due=False)
        if not metrics or not metrics["n_users"]:
            return
        epoch = (state.step - 1) // self.stream.steps_per_epoch
        told = summary(metrics, run.config.run.told_metrics)
        run.say(f"step {state.step}, epoch {epoch}: validation {told}")
        line = {"step": state.step, "epoch": epoch, "split": "validation", **metrics}
        run.record(line, "validation")
        best_by = run.config.run.best_by
        if state.best is None or metrics[best_by] > state.best[best_by]:
            self.state = state.with_best(metrics)
            self._saver.save_best(self.state)


def _earlier_name(parallel: ParallelConfig) -> str:
    """What to tell the user of a configuration of an earlier version, or ""."""
    if not parallel.trunk_dtype:
        return ""
    return (
        "parallel.trunk_dtype is an earlier name of parallel.precision; "
        f"set parallel.precision to {parallel.trunk_dtype} instead"
    )
