"""Closed-form EASE as a run: Gram matrix of the shards, inverse, validation, checkpoint, result
(`model.kind: ease`).

A step is one lambda: the given one, or those of GRID from large to small until the validation
NDCG@100 has fallen twice in a row. The matrix is kept once: the Gram matrix of the next lambda is
computed again, into the same memory, because it costs a small part of what the inverse does. The
best lambda so far is on disk; a run that stopped goes on behind it. Loss, optimizer and reading
lanes of the configuration are not used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import read_json, reason
from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header, Position
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.checkpoint.write import save
from dist_vasp.config import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.ease import SWEEP_COLUMNS
from dist_vasp.model.vasp import VASP
from dist_vasp.parallel.agree import AgreedError, agreed, any_rank
from dist_vasp.parallel.comm import Ranks
from dist_vasp.plan import Sizes, make_plan
from dist_vasp.ranking.evaluate import model_scorer
from dist_vasp.training.environment import describe
from dist_vasp.training.fit_ease import StoppedError, fit
from dist_vasp.training.floor import measure_rates
from dist_vasp.training.run_dir import RunDir, check_shared
from dist_vasp.training.state import check_same, facts_of_data, newest_checkpoint
from dist_vasp.training.stop import StopRequest
from dist_vasp.training.tracking import services
from dist_vasp.training.train import (
    BEST_BY,
    check_folders,
    check_shards,
    evaluate_split,
    final_result,
    summary,
)

GRID = tuple(10.0 * 2**k for k in range(9, -1, -1))  # 5120 to 10
PATIENCE = 2  # lambdas in a row that may be worse than the best before the search ends


def solve(config: Config, ranks: Ranks) -> dict[str, Any] | None:
    """Compute EASE, or go on with the search of its lambda. Returns what result.json holds, None
    when a signal stopped it.

    Raises AgreedError for what a user can mend, a matrix that is singular in its precision
    included.
    """
    with closing(StopRequest()) as stop:
        return _solve(config, ranks, stop)


def _solve(config: Config, ranks: Ranks, stop: StopRequest) -> dict[str, Any] | None:
    manifest = _open(config, ranks)
    check_shards(config.data.shards, manifest, ranks)
    run_dir: RunDir | None = None
    with agreed(ranks):
        run_dir = RunDir(config.run.dir) if ranks.is_main else None
        if run_dir:
            services(run_dir.folder, config)  # a missing library is said now
    check_shared(config.run.dir, ranks)
    folder = Path(config.run.dir) / "checkpoints"
    lambdas = _lambdas(config)
    header, finished = _resume(config, manifest, folder, ranks)
    done = header.position.step if header else 0
    environment = describe(ranks)
    say: Callable[[str], None] = partial(print, flush=True) if ranks.is_main else lambda text: None
    if run_dir:
        newest = folders.newest(folder)
        folders.settle(folder, newest if header and header.best else None)
        folders.prune(folder, 1)
        if not finished:
            run_dir.drop_result()
        n_damaged = run_dir.open(config, manifest, len(lambdas) if finished else done, environment)
        if n_damaged:
            say(f"{n_damaged} damaged lines of metrics.jsonl are kept in metrics.damaged.jsonl")
    say(_opening(config, manifest, ranks, header, finished))
    try:
        if not finished:
            header = _search(config, manifest, ranks, lambdas, header, folder, run_dir, say, stop)
        assert header is not None
        name, seconds = (
            folders.step_path(folder, header.position.step).name,
            header.seconds_training,
        )
        result = final_result(
            config, manifest, name, ranks, seconds, 1, lambda: any_rank(stop.requested, ranks)
        )
    except StoppedError:
        result = None
    if run_dir and result and header:
        result["ease_lambda"] = header.ease_lambda
        run_dir.write_result(result)
    if run_dir:
        if result is None:
            say("stopped on request; the same command goes on behind the best lambda that is saved")
        run_dir.close()
    return result


def _search(
    config: Config,
    manifest: Manifest,
    ranks: Ranks,
    lambdas: tuple[float, ...],
    header: Header | None,
    folder: Path,
    run_dir: RunDir | None,
    say: Callable[[str], None],
    stop: StopRequest,
) -> Header:
    """Header of the best checkpoint after every lambda that is to be tried; `header` is that of an
    earlier attempt."""

    def interrupted() -> bool:
        return any_rank(stop.requested, ranks)

    model = VASP(
        config.model,
        config.loss,
        manifest.n_items,
        ranks,
        0,
        initialise=False,
        block_columns=SWEEP_COLUMNS,
    )
    scored = manifest.splits["validation"].users > 0
    seconds, fallen = header.seconds_training if header else 0.0, 0
    for step in range(header.position.step + 1 if header else 1, len(lambdas) + 1):
        value = lambdas[step - 1]
        start = time.monotonic()
        try:
            fit(
                model.output.W_IC,
                SWEEP_COLUMNS,
                config,
                manifest,
                value,
                ranks,
                ranks.is_main,
                interrupted,
            )
        except AgreedError as error:
            if header is None:
                raise
            say(f"lambda {value:g}: {error}; the search ends here")
            break
        took = time.monotonic() - start
        seconds += took
        metrics = None
        if scored:
            found = evaluate_split(
                model_scorer(model, None), config, manifest, "validation", ranks, interrupted
            )
            if found is None:
                raise StoppedError
            metrics = found.result()
            if not metrics["n_users"]:
                metrics = None
        if metrics is None and len(lambdas) > 1:
            raise AgreedError(_no_validation(config))
        say(
            f"lambda {value:g}: "
            + (f"validation {summary(metrics)}, " if metrics else "")
            + f"{took:.1f} s"
        )
        if run_dir and metrics:
            line = {
                "step": step,
                "epoch": 0,
                "split": "validation",
                "ease_lambda": value,
                "seconds": took,
            }
            run_dir.record({**line, **metrics}, "validation")
        if header is None or (metrics and header.best and metrics[BEST_BY] > header.best[BEST_BY]):
            fallen = 0
            header = _save(config, manifest, model, ranks, folder, step, value, seconds, metrics)
        else:
            fallen += 1
            if fallen == PATIENCE:
                break
    assert header is not None
    return replace(header, seconds_training=seconds)


# --- before and after ------------------------------------------------------------------------------------------------


def _open(config: Config, ranks: Ranks) -> Manifest:
    """The manifest; AgreedError where shards and configuration do not fit together."""
    with agreed(ranks):
        check_folders(config)
        manifest = Manifest.load(config.data.shards)
        if manifest.splits["train"].users < 1:
            raise ValueError(
                f"{config.data.shards} has no training users; prepare the data with fewer val_users and test_users"
            )
        if not config.model.ease_lambda and not manifest.splits["validation"].users:
            raise ValueError(_no_validation(config))
        ranks.partition_of_items(manifest.n_items)
    return manifest


def _no_validation(config: Config) -> str:
    return (
        f"model.ease_lambda is 0, so it is to be chosen on validation, but {config.data.shards} has no validation user with a target; "
        "set model.ease_lambda, or prepare the data with some"
    )


def _lambdas(config: Config) -> tuple[float, ...]:
    return (config.model.ease_lambda,) if config.model.ease_lambda else GRID


def _matching(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What a resumed run may not change; nothing else has a part in the result."""
    m = config.model
    return {
        "model.kind": m.kind,
        "model.ease_lambda": m.ease_lambda,
        "model.ease_dtype": m.ease_dtype,
        "model.ease_dropout": m.ease_dropout,
        "model.ease_user_exponent": m.ease_user_exponent,
        "hash of data.shards": manifest.shards_sha256,
    }


def _resume(
    config: Config, manifest: Manifest, folder: Path, ranks: Ranks
) -> tuple[Header | None, bool]:
    """Header of the best lambda so far, None where there is none, and whether the run has its
    result already."""
    header = None
    opened = folders.open_together(lambda: newest_checkpoint(folder), open_checkpoint, ranks)
    with agreed(ranks):
        if opened is not None:
            check_same(opened, _matching(config, manifest), manifest)
            header = opened.header
            opened.close()
        result = folder.parent / "result.json"
        finished = header is not None and result.is_file()
        if header and finished:
            # of the lambdas behind the best one, too
            header = replace(header, seconds_training=_seconds(result))
    return header, finished


def _seconds(result: Path) -> float:
    try:
        return float(read_json(result)["seconds_training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{result} cannot be read ({reason(error)}); remove it, and the same command resumes the search"
        ) from None


def _save(
    config: Config,
    manifest: Manifest,
    model: VASP,
    ranks: Ranks,
    folder: Path,
    step: int,
    value: float,
    seconds: float,
    metrics: dict[str, Any] | None,
) -> Header:
    """Write the model as step-XXXXXXXX, from the matrix itself; point `best` at it if it was
    validated. Returns its header."""
    header = Header(
        position=Position(0, 0, step),
        config=asdict(config),
        must_match=_matching(config, manifest),
        **facts_of_data(config, manifest),
        layout=asdict(ranks.layout),
        optimizer={"step": 0, "mu_product": 1.0},
        seconds_training=seconds,
        ease_lambda=value,
        best=metrics,
    )
    path = folder / f"step-{step:08d}"
    save(path, header, model.slices(), {}, ranks)
    if ranks.is_main:
        if metrics:
            folders.point_best_at(path)
        folders.prune(folder, 1)
    return header


def _opening(
    config: Config, manifest: Manifest, ranks: Ranks, header: Header | None, finished: bool
) -> str:
    train, m = manifest.splits["train"], config.model
    text = f"ease on {train.users:,} users and {manifest.n_items:,} items in {m.ease_dtype}, {ranks.layout.partitions} partitions: "
    if finished and header:
        return (
            text
            + f"{config.run.dir} already holds lambda {header.ease_lambda:g}; it is evaluated again"
        )
    text += (
        f"lambda {m.ease_lambda:g}"
        if m.ease_lambda
        else f"lambda by validation, at most {len(GRID)} from {GRID[0]:g} down"
    )
    return text + (f" (resumed behind lambda {header.ease_lambda:g})" if header else "")


def dry_run(config: Config, ranks: Ranks) -> str:
    """Check config and shards as `solve` does, and say what memory and time it takes; nothing is
    built or written."""
    manifest = _open(config, ranks)
    check_shards(config.data.shards, manifest, ranks)
    train, layout = manifest.splits["train"], ranks.layout
    rates = measure_rates(ranks.device, min(manifest.n_items, 1 << 14))
    sizes = Sizes(manifest.n_items, train.interactions / max(train.users, 1), train.users)
    plan = make_plan(config, sizes, layout.partitions, layout.replicas, rates, ranks.device.type)
    newest = folders.newest(Path(config.run.dir) / "checkpoints")
    parts = ", ".join(f"{kind} {n_bytes / 1e9:.2f}" for kind, n_bytes in plan.memory.items())
    lambdas = "one lambda" if config.model.ease_lambda else f"each of at most {len(GRID)} lambdas"
    return (
        f"dry run: ease, {train.users:,} training users, {manifest.n_items:,} items, {config.model.ease_dtype}\n"
        f"memory of a rank, {layout.partitions} partitions: {plan.memory_total / 1e9:.2f} GB ({parts})\n"
        f"time for {lambdas}, evaluation excluded: about {plan.step_seconds:,.0f} s at the {rates.flops / 1e9:.0f} GFLOP/s measured now\n"
        f"run.dir {config.run.dir}: "
        + (f"would go on behind {newest.name}" if newest else "would start anew")
    )
