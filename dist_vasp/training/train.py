"""The training loop, told straight: check, build, resume, train, evaluate, keep the best, write the
result."""

from __future__ import annotations

import gc
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.read import header_of
from dist_vasp.config import Config
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.shard import read_shard
from dist_vasp.data.stream import Batch, TrainStream
from dist_vasp.model.item_layers import BLOCK_COLUMNS
from dist_vasp.parallel.agree import AgreedError, agreed, any_rank
from dist_vasp.parallel.comm import Ranks, all_gather_bytes, all_gather_keys
from dist_vasp.parallel.launched import launched_world
from dist_vasp.progress import Progress
from dist_vasp.ranking.evaluate import Scorer, evaluate, model_scorer
from dist_vasp.ranking.load import load_model
from dist_vasp.ranking.metrics import RankingMetrics
from dist_vasp.tensor_file import MOST_TENSORS
from dist_vasp.training.engine import DivergedError, Trainer
from dist_vasp.training.environment import Memory, describe
from dist_vasp.training.fit_ease import start_from_ease
from dist_vasp.training.grow import initialise_from, open_source
from dist_vasp.training.run_dir import RunDir, check_shared, write_atomically
from dist_vasp.training.state import RunState, Saver, resume, total_steps
from dist_vasp.training.stop import StopRequest
from dist_vasp.training.tracking import services

BEST_BY = "ndcg@100"


def train(config: Config, ranks: Ranks, init_from: str | None = None) -> dict[str, Any] | None:
    """Train to the end of the schedule (or `run.max_steps`), resuming what is in `run.dir`.

    `init_from`: a run whose weights a new run starts from, matched by original item ids. Returns what result.json holds, or
    None when a signal stopped the run: it is saved then, and the same call goes on. Raises AgreedError for what a user can
    mend, DivergedError when the loss is no longer finite.
    """
    with ExitStack() as workers, closing(StopRequest()) as stop:  # however the run ends
        return _train(config, ranks, init_from, workers, stop)


def _train(
    config: Config, ranks: Ranks, init_from: str | None, workers: ExitStack, stop: StopRequest
) -> dict[str, Any] | None:
    # Check everything that is cheap to check.
    stream = open_stream(config, ranks)
    check_shards(config.data.shards, stream.manifest, ranks)
    run_dir: RunDir | None = None
    with agreed(ranks):
        check_memory(config, stream.n_items, ranks)
        if init_from:
            open_source(init_from, config.model)
        run_dir = RunDir(config.run.dir) if ranks.is_main else None
        if run_dir:
            services(run_dir.folder, config)  # a missing library is said now
    check_shared(config.run.dir, ranks)
    folder = Path(config.run.dir) / "checkpoints"
    last = total_steps(config, stream.steps_per_epoch)
    first = folders.newest_step(folder)
    # The loader's workers start before there are weights to inherit.
    batches = workers.enter_context(closing(stream.batches(first, last, config.data.workers)))

    # Build the model; go on from the newest checkpoint if there is one.
    trainer = Trainer(config, stream.n_items, ranks)
    state = resume(trainer, stream, folder, ranks)
    if state is None:
        state = RunState()
        if config.model.init_from_ease:
            start_from_ease(trainer, stream.manifest)
        if init_from:
            initialise_from(trainer, init_from, config.data.shards)
    if state.step != first:
        # Somebody has renamed the checkpoint.
        batches.close()
        batches = workers.enter_context(
            closing(stream.batches(state.step, last, config.data.workers))
        )
    environment, memory, moved = (
        describe(ranks),
        Memory(ranks.device),
        sum(ranks.bytes_moved().values()),
    )
    state.attempt = all_gather_bytes(secrets.token_hex(8).encode(), ranks.world, ranks.device)[
        0
    ].decode()
    progress = Progress("training", last, "step", state.step, show=ranks.is_main)
    if run_dir:
        _begin(run_dir, config, stream.manifest, state, environment, last, progress)
    progress.say(_opening(config, stream, trainer, state.step, last))
    if trainer.remark:
        progress.say(trainer.remark)
    saver = Saver(trainer, stream, folder, progress.say)
    interrupted = lambda: any_rank(stop.requested, ranks)  # noqa: E731 - a question that all ranks answer together

    # Train.
    if state.evaluation_due:
        _evaluate_and_keep_best(trainer, stream, state, saver, run_dir, progress, interrupted)
    clock = time.monotonic()
    for batch, following in with_next(batches):
        waited = time.monotonic() - clock
        try:
            report = trainer.step(
                batch, stop=stop.requested, written=saver.written, following=following
            )
        except DivergedError as error:
            saver.keep_what_is_good(state.step)
            raise _explained(error, batch, folder, run_dir, ranks) from None
        state.step += 1
        now = time.monotonic()
        elapsed, clock = now - clock, now
        state.seconds += elapsed
        rate = batch.global_users / elapsed
        if run_dir:
            line = {
                "step": state.step,
                "epoch": batch.epoch,
                "loss": report.loss,
                "focal": report.focal,
                "kl": report.kl,
            }
            line |= {
                "lr": config.lr(batch.epoch),
                "grad_norm": report.grad_norm,
                "users_per_second": rate,
            }
            line |= {
                "step_seconds": elapsed,
                "data_wait": waited / elapsed,
                **report.paths,
                **memory.now(),
            }
            line["bytes_moved"] = sum(ranks.bytes_moved().values()) - moved
            run_dir.record(line, "train")
        progress.update(
            state.step, f"epoch {batch.epoch}, loss {report.loss:.4f}, {rate:,.0f} users/s"
        )

        # Evaluate at the end of an epoch, keep the best; save.
        if report.all_written:
            saver.finish()
        epoch_ends, every, cadence = (
            state.step % stream.steps_per_epoch == 0,
            config.run.evaluate_every_epochs,
            config.run.checkpoint_every_steps,
        )
        state.evaluation_due = bool(every) and (
            (epoch_ends and (batch.epoch + 1) % every == 0) or state.step == last
        )
        if state.evaluation_due and not report.stop:
            try:
                _evaluate_and_keep_best(
                    trainer, stream, state, saver, run_dir, progress, interrupted
                )
            except (
                AgreedError
            ) as error:  # shards that were replaced, for instance: the steps are not lost
                saver.save(state)
                saver.finish()
                raise AgreedError(
                    f"{error}; saved after step {state.step}, and the same command resumes there"
                ) from None
        stopping = report.stop or state.evaluation_due
        if stopping or state.step == last or (state.step % cadence == 0 if cadence else epoch_ends):
            saver.save(state)
        if stopping:
            break
        clock, moved = (
            time.monotonic(),
            sum(ranks.bytes_moved().values()),
        )  # those of evaluating and saving left out
    saver.finish()
    progress.close()

    # Evaluate the best checkpoint and write the result.
    result = None
    if state.step == last and not state.evaluation_due:
        trainer.close()
        del trainer, saver
        # the optimizers are part of cycles: their matrices would stay beside those of the best
        # checkpoint
        gc.collect()
        name = (
            folders.best_path(folder, state.best_checkpoint.step)
            if state.best_checkpoint
            else folders.step_path(folder, last)
        ).name
        result = final_result(
            config,
            stream.manifest,
            name,
            ranks,
            state.seconds,
            last / stream.steps_per_epoch,
            interrupted,
        )
    if run_dir and result:
        run_dir.write_result(result)
    if run_dir:
        if result is None:
            progress.say(
                f"stopped on request after step {state.step} of {last}, saved in {folder}; the same command goes on from there"
            )
        run_dir.close()
    return result


def _begin(
    run_dir: RunDir,
    config: Config,
    manifest: Manifest,
    state: RunState,
    environment: dict[str, Any],
    last: int,
    progress: Progress,
) -> None:
    """Make run.dir hold the past of `state` and nothing else, and say what of it is missing or
    damaged."""
    folder = run_dir.checkpoints
    best = folders.best_path(folder, state.best_checkpoint.step) if state.best_checkpoint else None
    if best is not None and not best.exists():
        best = (
            folder / folders.BEST
        )  # a copy of the run that followed the link, and has nothing else
    folders.settle(folder, best)
    folders.prune(folder, config.run.keep)
    finished = state.step == last and not state.evaluation_due
    kept = (
        folders.best_path(folder, state.best_checkpoint.step)
        if state.best_checkpoint
        else folders.step_path(folder, last)
    )
    header = header_of(kept) if finished else None
    run_dir.drop_result(unless=header.header_sha256 if header else "")
    n_damaged = run_dir.open(config, manifest, state.step, environment, state.evaluation_due)
    if n_damaged:
        progress.say(
            f"{n_damaged} damaged lines of metrics.jsonl are kept in metrics.damaged.jsonl"
        )
    if state.lost_best:
        progress.say(
            "the best checkpoint of the resumed run is not in its folder; the best one is looked for from here on"
        )


def with_next(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
    """Each batch together with the one after it, None after the last."""
    iterator = iter(batches)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch, following
        batch = following


# --- before the first step -------------------------------------------------------------------------------------------


def open_stream(config: Config, ranks: Ranks) -> TrainStream:
    """This rank's stream; AgreedError where shards and config do not fit together."""
    with agreed(ranks):
        check_folders(config)
        return make_stream(config, ranks)


def make_stream(config: Config, ranks: Ranks) -> TrainStream:
    """The part of the stream of `config` that this rank reads; ValueError where the shards do not
    fit."""
    d, p = config.data, config.parallel
    return TrainStream(
        d.shards,
        d.batch_size,
        p.lanes,
        config.run.seed,
        config.halves,
        ranks.rank,
        ranks.world_size,
        d.input_dropout,
    )


def check_folders(config: Config) -> None:
    """ValueError unless the data folder and the run's folder are given, and are two."""
    if not config.data.shards:
        raise ValueError(
            "data.shards is not set; pass --data.shards with a folder written by `python -m data_tools.shard`"
        )
    if not config.run.dir:
        raise ValueError(
            "run.dir is not set; pass --run.dir with the folder that should hold the run"
        )
    if Path(config.run.dir).resolve() == Path(config.data.shards).resolve():
        raise ValueError(
            f"run.dir and data.shards are both {config.run.dir}; a run needs a folder of its own"
        )


def check_shards(folder: str | Path, manifest: Manifest, ranks: Ranks) -> None:
    """Read every shard once before hours are spent; the ranks share them out.

    AgreedError names the damaged one.
    """
    with agreed(ranks):
        shards = [(split, entry) for split in SPLITS for entry in manifest.splits[split].shards]
        mine = shards[ranks.rank :: ranks.world_size]
        progress = Progress("checking shards", len(mine), "shard", show=ranks.is_main, brief=True)
        for done, (split, entry) in enumerate(mine):
            read_shard(folder, split, entry, manifest.n_items)
            progress.update(done + 1)
        progress.close()


def check_memory(config: Config, n_items: int, ranks: Ranks) -> None:
    """ValueError where the bare fp32 weights of this machine's ranks exceed its memory, or W has
    more blocks than a file may hold.

    `launch/plan.py` estimates the rest.
    """
    m, owned = config.model, -(-n_items // ranks.layout.partitions)
    columns = config.parallel.block_columns or BLOCK_COLUMNS
    pieces = (
        -(-owned // columns) * 4 if m.shallow else 0
    )  # W, its moments and its start, in a file of each partition
    if pieces > MOST_TENSORS // 2:
        raise ValueError(
            f"parallel.block_columns is {columns}, which cuts the W of {owned:,} items into {pieces // 4:,} blocks, expected at most "
            f"{MOST_TENSORS // 8:,}; raise it"
        )
    if ranks.device.type != "cpu":
        return
    needed = 4 * (m.item_parameters(n_items, owned) + m.trunk_parameters()) * launched_world()[3]
    there = psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"the weights of model.hidden {m.hidden} and model.latent {m.latent} on {n_items:,} items take {needed / 1e9:,.0f} GB on this "
            f"machine, which has {there / 1e9:,.0f} GB; lower them or start more machines, python launch/plan.py says how many"
        )


def dry_run(config: Config, ranks: Ranks) -> str:
    """Check config and shards as `train` does, and say what would be trained; nothing is built or
    written."""
    stream = open_stream(config, ranks)
    check_shards(config.data.shards, stream.manifest, ranks)
    with agreed(ranks):
        check_memory(config, stream.n_items, ranks)
        if ranks.is_main:
            services(Path(config.run.dir), config)
    m, n_items, layout = config.model, stream.n_items, ranks.layout
    item_bytes = 12 if config.optimizer.item_state == "full" else 8
    frozen = m.frozen_parameters(n_items, n_items)
    item_gb = ((m.item_parameters(n_items, n_items) - frozen) * item_bytes + frozen * 4) / 1e9
    trunk_gb = m.trunk_parameters() * 12 / 1e9
    last = total_steps(config, stream.steps_per_epoch)
    newest = folders.newest(Path(config.run.dir) / "checkpoints")
    return (
        f"dry run: {m.kind}, {stream.n_users:,} training users, {n_items:,} items, {last:,} steps of about {config.data.batch_size} users "
        f"({stream.steps_per_epoch:,} an epoch)\n"
        f"weights and moments: item matrices {item_gb:.2f} GB, {item_gb / layout.partitions:.2f} GB on each of {layout.partitions} "
        f"partitions; trunk about {trunk_gb:.2f} GB over {layout.world_size} ranks\n"
        f"run.dir {config.run.dir}: "
        + (f"would resume from {newest.name}" if newest else "would start anew")
    )


def _opening(config: Config, stream: TrainStream, trainer: Trainer, step: int, last: int) -> str:
    n_items = sum(p.tensor.numel() for p in trainer.model.slices())
    n_trunk = trainer.trunk.n_parameters if trainer.trunk else 0
    layout = trainer.ranks.layout
    ahead = f"steps {step + 1} to {last}" if step < last else f"all {last} steps are done"
    return (
        f"{config.model.kind} on {stream.n_users:,} users and {stream.n_items:,} items: {n_items / 1e6:.1f}M item parameters on this rank, "
        f"{n_trunk / 1e6:.1f}M in the trunk; {layout.partitions} partitions x {layout.replicas} replicas on {trainer.ranks.device.type}; "
        f"{ahead}, {stream.steps_per_epoch} an epoch"
        + (f" (resumed from step {step})" if step else "")
    )


# --- evaluation ------------------------------------------------------------------------------------------------------


def _evaluate_and_keep_best(
    trainer: Trainer,
    stream: TrainStream,
    state: RunState,
    saver: Saver,
    run_dir: RunDir | None,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> None:
    """Validation metrics of this step; `state.evaluation_due` stays True where a stop came first."""
    metrics = None
    if stream.manifest.splits["validation"].users:
        with trainer.evaluating() as trunk:
            scorer = model_scorer(trainer.model, trunk)
            found = evaluate_split(
                scorer, trainer.config, stream.manifest, "validation", trainer.ranks, interrupted
            )
        if found is None:
            return
        metrics = found.result()
    state.evaluation_due = False
    if not metrics or not metrics["n_users"]:
        return
    epoch = (state.step - 1) // stream.steps_per_epoch
    progress.say(f"step {state.step}, epoch {epoch}: validation {summary(metrics)}")
    if run_dir:
        run_dir.record(
            {"step": state.step, "epoch": epoch, "split": "validation", **metrics}, "validation"
        )
    if state.best is None or metrics[BEST_BY] > state.best[BEST_BY]:
        state.best = metrics
        saver.save_best(state)


def evaluate_split(
    scorer: Scorer,
    config: Config,
    manifest: Manifest,
    split: str,
    ranks: Ranks,
    interrupted: Callable[[], bool],
) -> RankingMetrics | None:
    """`evaluate` with its progress, as a part of a training, on the shards that it began with."""
    check_same_shards(config.data.shards, manifest, ranks)
    progress = Progress(
        f"evaluating {split}", manifest.splits[split].users, "user", show=ranks.is_main, brief=True
    )
    denominator = config.run.recall_denominator
    try:
        return evaluate(
            scorer,
            config.data.shards,
            split,
            ranks,
            progress.update,
            interrupted=interrupted,
            recall_denominator=denominator,
            manifest=manifest,
        )
    finally:
        progress.close()


def check_same_shards(folder: str, manifest: Manifest, ranks: Ranks) -> None:
    """AgreedError where the data folder has been replaced since `manifest` was read, when the run
    began."""
    with agreed(ranks):
        if ranks.is_main and (found := Manifest.load(folder).data_sha256) != manifest.data_sha256:
            raise ValueError(
                f"data.shards {folder} was replaced while the run was going on: it began with shards of hash "
                f"{manifest.data_sha256[:12]}..., now it is {found[:12]}...; restore them, or train on the new ones in a new run.dir"
            )


def final_result(
    config: Config,
    manifest: Manifest,
    name: str,
    ranks: Ranks,
    seconds: float,
    epochs: float,
    interrupted: Callable[[], bool],
) -> dict[str, Any] | None:
    """What result.json holds, for the checkpoint `name`; None where a stop came first."""
    loaded = load_model(config.run.dir, name, ranks)
    result: dict[str, Any] = {}
    scorer = model_scorer(loaded.model, loaded.trunk)
    for split in ("validation", "test"):
        result[split] = None
        if manifest.splits[split].users:
            metrics = evaluate_split(scorer, config, manifest, split, ranks, interrupted)
            if metrics is None:
                return None
            result[split] = metrics.result()
    return {
        **result,
        "seconds_training": seconds,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "world_size": ranks.world_size,
        "checkpoint": loaded.checkpoint.name,
        "checkpoint_sha256": loaded.checkpoint.header.header_sha256,
    }


def summary(metrics: dict[str, Any]) -> str:
    """`NDCG@100 0.4081 +- 0.0056, Recall@20 0.3490, ...` for people."""
    if not metrics["n_users"]:
        return "no user has a target"
    se = metrics["ndcg@100_se"]
    return (
        f"NDCG@100 {metrics['ndcg@100']:.4f}{f' +- {se:.4f}' if se is not None else ''}, Recall@20 {metrics['recall@20']:.4f}, "
        f"Recall@50 {metrics['recall@50']:.4f}, coverage@100 {metrics['coverage@100']:.3f} ({metrics['n_users']} users)"
    )


def _explained(
    error: DivergedError, batch: Batch, folder: Path, run_dir: RunDir | None, ranks: Ranks
) -> DivergedError:
    """The error with the users of the batch and the last good checkpoint; all ranks diverge at the
    same step."""
    keys = sorted(set(all_gather_keys(batch.user_keys, ranks)))
    path = Path(folder).parent / f"diverged-step-{batch.step + 1}.json"
    if run_dir:
        write_atomically(path, json.dumps({"step": batch.step + 1, "user_keys": keys}) + "\n")
    good = folders.newest(folder)
    some = ", ".join(map(str, keys[:5])) + (", ..." if len(keys) > 5 else "")
    return DivergedError(
        f"{error}; the batch holds {len(keys)} users with keys {some} (all in {path}); the last good checkpoint is {good or 'none'}; "
        "lower the learning rate or set optimizer.clip_norm, and start again"
    )
