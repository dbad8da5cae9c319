"""A training run, told straight: check, build, resume, fit, evaluate the best, write the result."""

from __future__ import annotations

import gc
from contextlib import closing
from pathlib import Path
from typing import Any

from dist_vasp.checkpoint import folder as folders
from dist_vasp.config.schema import Config
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.ranking.load import load_model
from dist_vasp.training.checks import check_folders, check_shards
from dist_vasp.training.closed_form.parts import has_parts, parts_folder
from dist_vasp.training.closed_form.setup import ClosedFormSetup
from dist_vasp.training.run import FitSetup, Fitted, Run
from dist_vasp.training.run_dir import RunDir, check_shared
from dist_vasp.training.step.setup import StepSetup
from dist_vasp.training.stop import StopRequest
from dist_vasp.training.tracking import services


def train(
    config: Config,
    ranks: Ranks,
    init_from: str | None = None,
    allow_leak: bool = False,
    stop: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Fit the model of `config`, resuming what is in `run.dir`, and write result.json.

    `stop`: what asks for the end; by default signals do.
    `init_from`: a run whose weights a new run starts from, matched by original item ids; with
    `allow_leak` also where it was trained on users that are held out now. Returns
    what result.json holds, or None when a signal stopped the run: it is saved then, and the same
    call resumes it. Raises AgreedError for what a user can fix, DivergedError when the loss is no
    longer finite.
    """
    with closing(stop or StopRequest()) as stop:
        setup = _check(config, ranks, init_from, allow_leak)
        run = _take_folder(config, setup, stop)
        fitted = _fit(run, setup)
        # The optimizers are part of cycles: their matrices would stay beside those of the best
        # checkpoint.
        gc.collect()
        result = final_result(run, fitted) if fitted else None
        run.end(result)
        return result


def dry_run(config: Config, ranks: Ranks) -> str:
    """Check config and shards as `train` does, and return what would be trained; nothing is built
    or written."""
    setup = _check(config, ranks, None)
    with agreed(ranks):
        if ranks.is_main:
            services(Path(config.run.dir), config)
    newest = folders.newest(Path(config.run.dir) / "checkpoints")
    parts = parts_folder(config.run.dir)
    starts = [newest.name] if newest else []
    if has_parts(parts):
        starts.append(f"the parts in {parts.name} that match")
    what = f"would resume from {' and '.join(starts)}" if starts else "would start anew"
    return f"dry run: {setup.describe()}\nrun.dir {config.run.dir}: {what}"


def make_setup(
    config: Config, ranks: Ranks, init_from: str | None, allow_leak: bool = False
) -> FitSetup:
    """Return the way in which the model of `config` is fitted."""
    if kind_of(config.model.kind).closed_form:
        return ClosedFormSetup(config, ranks)
    return StepSetup(config, ranks, init_from, allow_leak)


def _check(
    config: Config, ranks: Ranks, init_from: str | None, allow_leak: bool = False
) -> FitSetup:
    """Check everything that is cheap to check; AgreedError where something does not fit."""
    setup: FitSetup | None = None
    with agreed(ranks):
        check_folders(config)
        setup = make_setup(config, ranks, init_from, allow_leak)
    assert setup is not None
    for folder, manifest in setup.folders:
        check_shards(folder, manifest, ranks)
    with agreed(ranks):
        setup.check()
    return setup


def _take_folder(config: Config, setup: FitSetup, stop: StopRequest) -> Run:
    """Lock the run's folder; AgreedError where another run owns it or a rank does not see it."""
    ranks = setup.ranks
    run_dir: RunDir | None = None
    with agreed(ranks):
        if ranks.is_main:
            run_dir = RunDir(config.run.dir)
            services(run_dir.folder, config)  # a missing library is said now
    check_shared(config.run.dir, ranks)
    return Run(config, ranks, setup.manifest, run_dir, stop)


def _fit(run: Run, setup: FitSetup) -> Fitted | None:
    """Build, resume and fit; nothing of the model is left in memory afterwards."""
    with closing(setup.start(run)) as fit:
        run.begin(fit, setup)
        run.say(fit.opening())
        fitted = fit.fit()
        if fitted is None:
            run.say(fit.stopped())
        return fitted


def final_result(run: Run, fitted: Fitted) -> dict[str, Any] | None:
    """Evaluate the fitted checkpoint and return what result.json holds; None where a stop was
    requested meanwhile."""
    loaded = load_model(run.config.run.dir, fitted.checkpoint, run.ranks)
    scorer = loaded.model.scores
    result: dict[str, Any] = {}
    for split in ("validation", "test"):
        result[split] = None
        if run.manifest.splits[split].users:
            metrics = run.evaluate(scorer, split)
            if metrics is None:
                run.say(fitted.stopped)
                return None
            result[split] = metrics.result()
    epochs = fitted.epochs
    return {
        **result,
        "seconds_training": fitted.seconds,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "world_size": run.ranks.world_size,
        "checkpoint": loaded.checkpoint.name,
        "checkpoint_sha256": loaded.checkpoint.header.header_sha256,
        **fitted.facts,
    }
