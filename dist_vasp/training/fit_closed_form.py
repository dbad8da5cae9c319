"""Fit in closed form: EASE from the Gram matrix of the shards (`model.kind: ease`).

A step is one lambda: the given one, or those of GRID from large to small until the validation
metric `run.best_by` has fallen twice in a row. The matrix is kept once: the Gram matrix of the next
lambda is computed again, into the same memory, because it costs a small part of what the inverse
does. The best lambda so far is on disk; a run that stopped resumes after it. Loss, optimizer and
reading lanes of the configuration are not used.
"""

from __future__ import annotations

import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import read_json, reason
from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.checkpoint.write import save
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.build import new_model
from dist_vasp.model.ease import sweep_columns
from dist_vasp.model.kinds.ease import EaseKeys
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.parallel.agree import AgreedError, agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.plan.estimate import make_plan
from dist_vasp.plan.terms import Device, Sizes
from dist_vasp.ranking.evaluate import model_scorer
from dist_vasp.ranking.metrics import summary
from dist_vasp.training.fit_ease import StoppedError, fit
from dist_vasp.training.floor import measure_rates
from dist_vasp.training.run import Fitted, Past, Run
from dist_vasp.training.state import check_same, facts_of_data, newest_checkpoint
from dist_vasp.training.trained_users import Users

GRID = tuple(10.0 * 2**k for k in range(9, -1, -1))  # 5120 to 10
PATIENCE = 2  # lambdas in a row that may be worse than the best before the search ends


class ClosedFormSetup:
    """The closed form, before there is a matrix; see `FitSetup`."""

    keep = 1
    earlier_users: Users | None = None

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.manifest = Manifest.load(config.data.shards)
        self._config = config
        self._ranks = ranks
        splits = self.manifest.splits
        if splits["train"].users < 1:
            raise ValueError(
                f"{config.data.shards} has no training users; "
                "prepare the data with fewer val_users and test_users"
            )
        if not config.model.ease_lambda and not splits["validation"].users:
            raise ValueError(_no_validation(config))
        ranks.partition_of_items(self.manifest.n_items)

    def check(self) -> None:
        """Nothing more than was checked when the shards were opened."""

    def describe(self) -> str:
        config, layout, device = self._config, self._ranks.layout, self._ranks.device
        train, n_items = self.manifest.splits["train"], self.manifest.n_items
        rates = measure_rates(device, min(n_items, 1 << 14))
        sizes = Sizes(n_items, train.interactions / max(train.users, 1), train.users)
        plan = make_plan(
            config, sizes, layout.partitions, layout.replicas, rates, Device(device.type)
        )
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in plan.memory.items())
        n_lambdas = len(lambdas_of(config))
        lambdas = "one lambda" if n_lambdas == 1 else f"each of at most {n_lambdas} lambdas"
        return (
            f"ease, {train.users:,} training users, {n_items:,} items, {config.model.ease_dtype}\n"
            f"memory of a rank, {layout.partitions} partitions: "
            f"{plan.memory_total / 1e9:.2f} GB ({parts})\n"
            f"time for {lambdas}, evaluation excluded: about {plan.step_seconds:,.0f} s "
            f"at the {rates.flops / 1e9:.0f} GFLOP/s measured now"
        )

    def start(self, run: Run) -> ClosedFormFit:
        """Read the header of the best lambda so far, if there is one."""
        config, ranks = run.config, run.ranks
        found: Header | None = None
        seconds, is_done = 0.0, False
        opened = folders.open_together(
            lambda: newest_checkpoint(run.checkpoints), open_checkpoint, ranks
        )
        with agreed(ranks):
            if opened is not None:
                check_same(opened, _must_match(config, self.manifest), self.manifest)
                found = opened.header
                opened.close()
                seconds = found.seconds_training
                result = Path(config.run.dir) / "result.json"
                is_done = result.is_file()
                if is_done:
                    seconds = _seconds(result)  # of the lambdas after the best one, too
        return ClosedFormFit(run, found, seconds, is_done)


class ClosedFormFit:
    """A search for lambda; `best` is the header of the best one so far. See `Fit`."""

    def __init__(self, run: Run, best: Header | None, seconds: float, is_done: bool) -> None:
        self.run = run
        self.best = best
        self._seconds = seconds
        self._is_done = is_done
        self._lambdas = lambdas_of(run.config)

    def close(self) -> None:
        """Nothing is held between calls."""

    # --- what is said of it -----------------------------------------------------------------------

    def past(self) -> Past:
        best = self.best
        done = best.position.step if best else 0
        return Past(
            after_step=len(self._lambdas) if self._is_done else done,
            best=folders.newest(self.run.checkpoints) if best and best.best else None,
            result_of=None if self._is_done else "",
        )

    def opening(self) -> str:
        manifest, layout, model = self.run.manifest, self.run.ranks.layout, self.run.config.model
        text = (
            f"ease on {manifest.splits['train'].users:,} users and {manifest.n_items:,} items in "
            f"{model.ease_dtype}, {layout.partitions} partitions: "
        )
        best = self.best
        if self._is_done and best:
            return (
                f"{text}{self.run.config.run.dir} already holds lambda {best.ease_lambda:g}; "
                "it is evaluated again"
            )
        if model.ease_lambda:
            text += f"lambda {model.ease_lambda:g}"
        else:
            text += f"lambda by validation, at most {len(GRID)} from {GRID[0]:g} down"
        return text + (f" (resumed after lambda {best.ease_lambda:g})" if best else "")

    def stopped(self) -> str:
        return "stopped on request; the same command resumes after the best lambda that is saved"

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
        facts = {"ease_lambda": best.ease_lambda}
        return Fitted(name, self._seconds, 1, self.stopped(), facts)

    def _search(self) -> None:
        """Try every lambda that is left; StoppedError where a stop was requested."""
        run = self.run
        blocks = replace(run.config.parallel, block_columns=sweep_columns(run.ranks.device))
        config = replace(run.config, parallel=blocks)
        model = new_model(config, run.manifest.n_items, run.ranks)
        fallen = 0
        first = self.best.position.step + 1 if self.best else 1
        for step in range(first, len(self._lambdas) + 1):
            value = self._lambdas[step - 1]
            try:
                took = self._solve(model, value)
            except AgreedError as error:
                if self.best is None:
                    raise
                run.say(f"lambda {value:g}: {error}; the search ends here")
                return
            metrics = self._validate(model, step, value, took)
            if self._is_better(metrics):
                fallen = 0
                self._save(model, step, value, metrics)
            else:
                fallen += 1
                if fallen == PATIENCE:
                    return

    def _solve(self, model: PartitionedModel, value: float) -> float:
        """Write B for lambda `value` into the model; return the seconds it took."""
        run, start = self.run, time.monotonic()
        config = replace(run.config, model=replace(run.config.model, ease_lambda=value))
        fit(
            model.matrices[0].columns(),
            sweep_columns(run.ranks.device),
            config,
            run.manifest,
            run.ranks,
            run.ranks.is_main,
            run.interrupted,
        )
        took = time.monotonic() - start
        self._seconds += took
        return took

    def _validate(
        self, model: PartitionedModel, step: int, value: float, took: float
    ) -> dict[str, Any] | None:
        """Return the validation metrics of a lambda; None where no user has a target."""
        run, metrics = self.run, None
        if run.manifest.splits["validation"].users > 0:
            found = run.evaluate(model_scorer(model, None), "validation")
            if found is None:
                raise StoppedError
            result = found.result()
            metrics = result if result["n_users"] else None
        if metrics is None and len(self._lambdas) > 1:
            raise AgreedError(_no_validation(run.config))
        shown = run.config.run.told_metrics
        told = f"validation {summary(metrics, shown)}, " if metrics else ""
        run.say(f"lambda {value:g}: {told}{took:.1f} s")
        if metrics:
            line = {"step": step, "epoch": 0, "split": "validation", "ease_lambda": value}
            run.record({**line, "seconds": took, **metrics}, "validation")
        return metrics

    def _is_better(self, metrics: dict[str, Any] | None) -> bool:
        if self.best is None:
            return True
        if metrics is None or self.best.best is None:
            return False
        best_by = self.run.config.run.best_by
        return metrics[best_by] > self.best.best[best_by]

    def _save(
        self, model: PartitionedModel, step: int, value: float, metrics: dict[str, Any] | None
    ) -> None:
        """Write the model as step-XXXXXXXX; point `best` at it if it was validated."""
        config, ranks, manifest = self.run.config, self.run.ranks, self.run.manifest
        self.best = Header(
            position=Position(0, 0, step),
            config=asdict(config),
            must_match=_must_match(config, manifest),
            **facts_of_data(config, manifest),
            layout=asdict(ranks.layout),
            optimizer={"step": 0, "mu_product": 1.0},
            seconds_training=self._seconds,
            ease_lambda=value,
            best=metrics,
        )
        path = folders.step_path(self.run.checkpoints, step)
        save(path, self.best, model.slices(), {}, ranks)
        if ranks.is_main:
            if metrics:
                folders.point_best_at(path)
            folders.prune(self.run.checkpoints, 1)


def lambdas_of(config: Config) -> tuple[float, ...]:
    """Return the lambdas that are tried, in order."""
    return (config.model.ease_lambda,) if config.model.ease_lambda else GRID


def _no_validation(config: Config) -> str:
    return (
        "model.ease_lambda is 0, so it is to be chosen on validation, but "
        f"{config.data.shards} has no validation user with a target; "
        "set model.ease_lambda, or prepare the data with some"
    )


def _must_match(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return what a resumed run may not change; nothing else has a part in the result."""
    names = ("kind", *(key.name for key in fields(EaseKeys)))
    matching = {f"model.{name}": getattr(config.model, name) for name in names}
    matching["run.best_by"] = config.run.best_by
    return matching | {"hash of data.shards": manifest.shards_sha256}


def _seconds(result: Path) -> float:
    try:
        return float(read_json(result)["seconds_training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{result} cannot be read ({reason(error)}); "
            "remove it, and the same command resumes the search"
        ) from None
