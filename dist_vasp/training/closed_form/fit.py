"""Fit in closed form, from the shards: EASE and its relatives, and singular vectors.

A step is one setting of settings.py: the given one, or those that are searched for the best
validation metric `run.best_by`. The matrix is kept once: the Gram matrix of the next setting is
computed again, into the same memory, because it costs a small part of what the inverse does. The
best setting so far is on disk; a run that stopped resumes after the last one it tried. Loss,
optimizer and reading lanes of the configuration are not used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.checkpoint.write import save
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import make_trunk, new_model
from dist_vasp.model.ease import Gpu, sweep_columns
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.registry import kind_of
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.evaluate import model_scorer
from dist_vasp.ranking.metrics import summary
from dist_vasp.training.closed_form.auxiliary import Overlap
from dist_vasp.training.closed_form.parts import has_parts, parts_folder, remove_parts
from dist_vasp.training.closed_form.settings import (
    PATIENCE,
    Candidate,
    Tried,
    n_settings,
    no_validation,
    walks_of,
)
from dist_vasp.training.closed_form.solve import solver_of
from dist_vasp.training.run import Fitted, Past, Run
from dist_vasp.training.state import facts_of_data
from dist_vasp.training.stop import StoppedError


class ClosedFormFit:
    """A search for the best setting; `best` is the header of the best one so far. See `Fit`.

    tried: the settings that need not be tried again, by their number. overlap: of `data.auxiliary`.
    gpu: what computes an exact matrix that is on the host.
    """

    def __init__(
        self,
        run: Run,
        best: Header | None,
        seconds: float,
        is_done: bool,
        tried: dict[int, Tried],
        overlap: Overlap | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self.run, self._overlap, self._gpu = run, overlap, gpu
        self.best = best
        self._is_done = is_done
        self._tried = tried
        self._walks = walks_of(run.config)
        best_step = best.position.step if best else 0
        later = [one.seconds for step, one in tried.items() if step > best_step]
        self._seconds = seconds + sum(later)
        self._last_tried = max((best_step, *tried))
        self._values = {step: one.value for step, one in tried.items()}
        self._model: PartitionedModel | None = None  # made when it is first needed, as these are
        self._trunk: Trunk | None = None
        self._solve: Callable[[ModelConfig], None] | None = None
        self._shape: tuple[Any, ...] = ()  # values of the keys that decide the model's shapes
        self._parts = parts_folder(run.config.run.dir)
        self._resumed = 0.0  # seconds of earlier starts, of what was resumed since `_took`

    def close(self) -> None:
        """Nothing is held between calls."""

    # --- what is said of it -----------------------------------------------------------------------

    def past(self) -> Past:
        best = self.best
        return Past(
            after_step=n_settings(self.run.config) if self._is_done else self._last_tried,
            best=folders.newest(self.run.checkpoints) if best and best.best else None,
            result_of=None if self._is_done else "",
        )

    def opening(self) -> str:
        run, best = self.run, self.best
        if self._is_done and best:
            holds = f"{run.config.run.dir} already holds {self._candidate(best.position.step)}"
            return f"{opening(run.config, run.manifest, run.ranks, holds)}; it is evaluated again"
        n_walks, first = len(self._walks), self._walks[0]
        tried = []
        if n_walks > 1:
            tried.append(f"{n_walks} combinations of {', '.join(first[0].searched)}")
        if first[0].walked:
            largest = first[0].model.ease_lambda
            by_validation = f"lambda by validation, at most {len(first)} from {largest:g} down"
            each = "each with " if tried else ""
            tried.append(each + (by_validation if len(first) > 1 else f"lambda {largest:g}"))
        text, last = opening(run.config, run.manifest, run.ranks, *tried), self._last_tried
        if self._gpu is not None:
            where = self._gpu.device
            text += f"; the matrix is on the host, for lack of memory on {where}, which computes it"
        return text + (f" (resumed after {self._candidate(last)})" if last else "")

    def _candidate(self, step: int) -> Candidate:
        walk = self._walk_of(step)
        return walk[(step - 1) % len(walk)]

    def _walk_of(self, step: int) -> list[Candidate]:
        return self._walks[(step - 1) // len(self._walks[0]) % len(self._walks)]

    def stopped(self) -> str:
        after = f"part of {self._parts}" if has_parts(self._parts) else "setting that was tried"
        return f"stopped on request; the same command resumes after the last {after}"

    # --- the search -------------------------------------------------------------------------------

    def fit(self) -> Fitted | None:
        try:
            if not self._is_done:
                self._search()
        except StoppedError:
            return None
        best = self.best
        assert best is not None
        name = folders.step_path(self.run.checkpoints, best.position.step).name
        facts = self._candidate(best.position.step).values
        return Fitted(name, self._seconds, 1, self.stopped(), facts)

    def _search(self) -> None:
        """Try every setting that is left; StoppedError where a stop was requested."""
        for walk in self._walks:
            self._walk(walk)
        chosen = self._by_one_standard_error()
        if chosen is not None:
            self._take(chosen)
        if self.run.ranks.is_main:
            remove_parts(self._parts)

    def _walk(self, walk: list[Candidate]) -> None:
        """Try the lambdas of one combination until the metric has fallen twice in a row."""
        best_by = self.run.config.run.best_by
        highest, fallen = -math.inf, 0
        for candidate in walk:
            if candidate.step in self._tried:
                value = self._tried[candidate.step].value
            elif candidate.step <= self._last_tried:
                continue  # it failed, or its line is lost
            else:
                self._solver(candidate.model)  # before `try`: damaged shards end the search
                try:
                    metrics = self._try(candidate)
                except AgreedError as error:
                    if self.best is None or not candidate.walked:
                        raise
                    self.run.say(f"{candidate}: {error}; smaller lambdas are left out")
                    return
                value = metrics[best_by] if metrics else math.inf
                self._values[candidate.step] = value
            fallen = 0 if value > highest else fallen + 1
            highest = max(highest, value)
            if fallen == PATIENCE:
                return

    def _by_one_standard_error(self) -> Candidate | None:
        """The setting that search.rule one_standard_error takes in place of the best; None where
        it is the best, or was taken before an earlier start ended.

        Its number is that of a setting after all others, so that its checkpoint is the newest.
        """
        best, n_tried = self.best, n_settings(self.run.config)
        if self.run.config.search.rule == "best" or best is None or best.best is None:
            return None
        step, best_by = best.position.step, self.run.config.run.best_by
        least = best.best[best_by] - (best.best[f"{best_by}_se"] or 0.0)
        if step > n_tried:
            return None
        for candidate in self._walk_of(step):  # lambda from large to small
            if candidate.step == step:
                break
            if candidate.step not in self._values:
                self.run.say(f"{candidate} is not considered: metrics.jsonl has lost its line")
            elif self._values[candidate.step] >= least:
                return replace(candidate, step=n_tried + candidate.step)
        return None

    def _take(self, chosen: Candidate) -> None:
        """Compute a setting again that was tried, and save it in place of the best one."""
        self.run.say(f"{chosen} is within one standard error of the best, so it is computed again")
        start = time.monotonic()
        self._solver(chosen.model)(chosen.model)
        self._took(start)
        self._save(chosen, self._evaluate())

    def _solver(self, keys: ModelConfig) -> Callable[[ModelConfig], None]:
        """Return what writes the weights of a setting, made before the first one and where the
        shapes change."""
        shape = tuple(getattr(keys, name) for name in kind_of(keys.kind).size_keys)
        if self._solve is None or shape != self._shape:
            start, run = time.monotonic(), self.run
            self._solve = self._model = self._trunk = None  # two models would not fit
            self._shape = shape
            gpu, n_items = self._gpu, run.manifest.n_items
            width = gpu.sweep_columns(n_items) if gpu else sweep_columns(run.ranks.device)
            blocks = replace(run.config.parallel, block_columns=width)
            config = replace(run.config, parallel=blocks, model=keys)
            self._model = new_model(config, n_items, run.ranks)
            self._trunk = make_trunk(keys)
            if self._trunk is not None:
                self._trunk.to(run.ranks.device).eval().requires_grad_(False)
            self._solve = solver_of(self._model, width, run, self._resume, self._overlap, gpu)
            self._took(start)
        return self._solve

    def _try(self, candidate: Candidate) -> dict[str, Any] | None:
        """Compute and validate a setting, and save it if it is the best so far."""
        start = time.monotonic()
        self._solver(candidate.model)(candidate.model)
        took = self._took(start)
        metrics = self._validate(candidate, took)
        if self._is_better(metrics):
            self._save(candidate, metrics)
        return metrics

    def _resume(self, seconds: float) -> None:
        self._resumed += seconds

    def _took(self, start: float) -> float:
        """Count the seconds since `start`, and those of earlier starts for what was resumed."""
        took, self._resumed = self._resumed + time.monotonic() - start, 0.0
        self._seconds += took
        return took

    def _validate(self, candidate: Candidate, took: float) -> dict[str, Any] | None:
        """Evaluate a setting and record it; None where no validation user has a target."""
        run, metrics = self.run, self._evaluate()
        if metrics is None and n_settings(run.config) > 1:
            raise AgreedError(no_validation(run.config))
        shown = run.config.run.told_metrics
        told = f"validation {summary(metrics, shown)}, " if metrics else ""
        run.say(f"{candidate}: {told}{took:.1f} s")
        if metrics:
            place = {"step": candidate.step, "epoch": 0, "split": "validation"}
            line = {**place, **candidate.values}
            run.record({**line, "seconds": took, **metrics}, "validation")
        return metrics

    def _evaluate(self) -> dict[str, Any] | None:
        """Return the validation metrics; None where no user has a target."""
        run, model = self.run, self._model
        assert model is not None
        if not run.manifest.splits["validation"].users:
            return None
        found = run.evaluate(model_scorer(model, self._trunk), "validation")
        if found is None:
            raise StoppedError
        result = found.result()
        return result if result["n_users"] else None

    def _is_better(self, metrics: dict[str, Any] | None) -> bool:
        if self.best is None:
            return True
        if metrics is None or self.best.best is None:
            return False
        best_by = self.run.config.run.best_by
        return metrics[best_by] > self.best.best[best_by]

    def _save(self, candidate: Candidate, metrics: dict[str, Any] | None) -> None:
        """Write the model as step-XXXXXXXX; point `best` at it if it was validated."""
        assert self._model is not None
        config, ranks, manifest = self.run.config, self.run.ranks, self.run.manifest
        settled = replace(config.search, rule="best")  # of one setting there is nothing to choose
        self.best = Header(
            position=Position(0, 0, candidate.step),
            config=asdict(replace(config, model=candidate.model, search=settled)),
            must_match=must_match_of(config, manifest, self._overlap),
            **facts_of_data(config, manifest),
            layout=asdict(ranks.layout),
            optimizer={"step": 0, "mu_product": 1.0},
            seconds_training=self._seconds,
            ease_lambda=candidate.values.get("ease_lambda"),
            best=metrics,
        )
        path = folders.step_path(self.run.checkpoints, candidate.step)
        trunk = {n: p.detach() for n, p in self._trunk.named_parameters()} if self._trunk else {}
        save(path, self.best, self._model.slices(), trunk, ranks)
        if ranks.is_main:
            if metrics:
                folders.point_best_at(path)
            folders.prune(self.run.checkpoints, 1)


def opening(config: Config, manifest: Manifest, ranks: Ranks, *more: str) -> str:
    """The model and its data in a few words, and then `more`."""
    model, users = config.model, manifest.splits["train"].users
    of = f"{model.kind} on {users:,} users and {manifest.n_items:,} items"
    facts = [f"{model.neighbours} inputs for each item"] if model.neighbours else []
    first = walks_of(config)[0][0]
    if first.walked:
        of += f" in {model.ease_dtype}"
    elif len(config.search.svd_rank) < 2:
        facts = [f"rank {first.model.svd_rank}"]
    return f"{of}, {ranks.layout.partitions} partitions: {', '.join([*facts, *more])}"


def must_match_of(config: Config, manifest: Manifest, overlap: Overlap | None) -> dict[str, Any]:
    """Return what a resumed run may not change; nothing else has a part in the result."""
    closed_form = kind_of(config.model.kind).closed_form
    assert closed_form is not None
    keys, search = closed_form.keys, asdict(config.search)
    matching = {f"model.{name}": getattr(config.model, name) for name in ("kind", *keys)}
    matching |= {f"search.{name}": search[name] for name in ("rule", *keys) if name in search}
    matching["run.best_by"] = config.run.best_by
    matching["hash of data.shards"] = manifest.shards_sha256
    if overlap is not None:
        matching["hash of data.auxiliary"] = overlap.manifest.data_sha256
    return matching
