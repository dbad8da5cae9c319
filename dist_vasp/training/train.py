"""The training loop, told straight: check, build, resume, train, evaluate, keep the best, write the result."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_vasp import checkpoint as checkpoints
from dist_vasp.checkpoint import Checkpoint
from dist_vasp.config import Config
from dist_vasp.data.format import SPLITS, Manifest, read_shard
from dist_vasp.data.stream import TrainStream
from dist_vasp.parallel.comm import Ranks, agreed
from dist_vasp.ranking.evaluate import evaluate, model_scorer
from dist_vasp.ranking.load import load_model
from dist_vasp.training.engine import DivergedError, Trainer
from dist_vasp.training.progress import Progress
from dist_vasp.training.run_dir import RunDir

BEST_BY = "ndcg@100"


def check_shards(folder: str | Path, manifest: Manifest, ranks: Ranks) -> None:
    """Read every shard once before hours are spent; the ranks share them out. AgreedError names the damaged one."""
    with agreed(ranks):
        shards = [(split, entry) for split in SPLITS for entry in manifest.splits[split].shards]
        for split, entry in shards[ranks.rank :: ranks.world_size]:
            read_shard(folder, split, entry, manifest.n_items)


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run: the schedule, or `run.max_steps` if that is less."""
    steps = config.epochs * steps_per_epoch
    return min(steps, config.run.max_steps) if config.run.max_steps else steps


def open_stream(config: Config, ranks: Ranks) -> TrainStream:
    """This rank's stream; AgreedError where shards and config do not fit together."""
    with agreed(ranks):
        if not config.data.shards:
            raise ValueError("data.shards is not set; pass --data.shards with a folder written by `python -m data_tools.shard`")
        if not config.run.dir:
            raise ValueError("run.dir is not set; pass --run.dir with the folder that should hold the run")
        return TrainStream(
            config.data.shards,
            config.data.batch_size,
            config.parallel.lanes,
            config.run.seed,
            config.halves,
            ranks.rank,
            ranks.world_size,
        )


def train(config: Config, ranks: Ranks) -> dict[str, Any]:
    """Train to the end of the schedule (or `run.max_steps`), resuming what is in `run.dir`; returns what result.json holds.

    Raises AgreedError for what a user can mend, DivergedError when the loss is no longer finite.
    """
    # Check everything that is cheap to check.
    stream = open_stream(config, ranks)
    check_shards(config.data.shards, stream.manifest, ranks)
    run_dir: RunDir | None = None
    with agreed(ranks):
        run_dir = RunDir(config.run.dir) if ranks.is_main else None
    folder = Path(config.run.dir) / "checkpoints"
    last = total_steps(config, stream.steps_per_epoch)

    # Build the model; go on from the newest checkpoint if there is one.
    trainer = Trainer(config, stream.n_items, ranks)
    step, seconds, best = _resume(trainer, stream, folder, ranks)
    if run_dir:
        checkpoints.prune(folder, config.run.keep)
        run_dir.open(config, step)
    progress = Progress("training", last, "step", step, show=ranks.is_main)
    progress.say(_opening(config, stream, trainer, step, last))

    # Train.
    clock = time.monotonic()
    batches = stream.batches(step, last, config.data.workers)
    for batch in batches:
        waited = time.monotonic() - clock
        try:
            report = trainer.step(batch)
        except DivergedError as error:
            good = checkpoints.newest(folder)
            raise DivergedError(
                f"{error}; the last good checkpoint is {good or 'none'}; lower the learning rate or set clip_norm"
            ) from None
        step += 1
        now = time.monotonic()
        elapsed, clock = now - clock, now
        seconds += elapsed
        rate = batch.global_users / elapsed
        if run_dir:
            line = {"step": step, "epoch": batch.epoch, **asdict(report), "lr": config.lr(batch.epoch), "users_per_second": rate}
            run_dir.record({**line, "step_seconds": elapsed, "data_wait": waited}, "train")
        progress.update(step, f"epoch {batch.epoch}, loss {report.loss:.4f}, {rate:,.0f} users/s")

        # Evaluate at the end of an epoch, keep the best; save.
        epoch_ends, every, cadence = (
            step % stream.steps_per_epoch == 0,
            config.run.evaluate_every_epochs,
            config.run.checkpoint_every_steps,
        )
        if every and ((epoch_ends and (batch.epoch + 1) % every == 0) or step == last):
            metrics = _validate(trainer, stream, ranks)
            if metrics:
                progress.say(f"step {step}, epoch {batch.epoch}: validation {summary(metrics)}")
                if run_dir:
                    run_dir.record({"step": step, "epoch": batch.epoch, "split": "validation", **metrics}, "validation")
                if best is None or metrics[BEST_BY] > best[BEST_BY]:
                    best = metrics
                    _save(trainer, stream, folder / f"best-{step:08d}", step, seconds, best)
                    if run_dir:
                        checkpoints.point_best_at(folder / f"best-{step:08d}")
        if step == last or (step % cadence == 0 if cadence else epoch_ends):
            _save(trainer, stream, folder / f"step-{step:08d}", step, seconds, best)
            if run_dir:
                checkpoints.prune(folder, config.run.keep)
        clock = time.monotonic()
    progress.close()

    # Evaluate the best checkpoint and write the result.
    del trainer
    result = _result(config, ranks, seconds, last / stream.steps_per_epoch)
    if run_dir:
        run_dir.write_result(result)
        run_dir.close()
    return result


def dry_run(config: Config, ranks: Ranks) -> str:
    """Check config and shards as `train` does, and say what would be trained; nothing is built or written."""
    stream = open_stream(config, ranks)
    check_shards(config.data.shards, stream.manifest, ranks)
    m, n_items, layout = config.model, stream.n_items, ranks.layout
    deep, shallow = m.kind != "nease", m.kind != "flvae"
    per_item = (2 * m.hidden + 1 + (m.latent + 1) * m.latent_head) * deep + n_items * shallow
    layers = (m.encoder_layers - 1 + m.decoder_layers - 1) * (m.hidden + 1) * m.hidden + 3 * m.hidden * m.latent
    item_gb, trunk_gb = per_item * n_items * 12 / 1e9, layers * 12 / 1e9 if deep else 0.0
    last = total_steps(config, stream.steps_per_epoch)
    newest = checkpoints.newest(Path(config.run.dir) / "checkpoints")
    return (
        f"dry run: {m.kind}, {stream.n_users:,} training users, {n_items:,} items, {last:,} steps of about {config.data.batch_size} users "
        f"({stream.steps_per_epoch:,} an epoch)\n"
        f"weights and moments: item matrices {item_gb:.2f} GB, {item_gb / layout.partitions:.2f} GB on each of {layout.partitions} "
        f"partitions; trunk about {trunk_gb:.2f} GB over {layout.world_size} ranks\n"
        f"run.dir {config.run.dir}: " + (f"would resume from {newest.name}" if newest else "would start anew")
    )


# --- resuming --------------------------------------------------------------------------------------------------------


def _must_match(config: Config, stream_sha256: str) -> dict[str, Any]:
    """What a resumed run may not change."""
    o = config.optimizer
    return {
        **{f"model.{k}": v for k, v in asdict(config.model).items()},
        **{f"loss.{k}": v for k, v in asdict(config.loss).items()},
        **{f"optimizer.{k}": v for k, v in asdict(o).items() if k not in ("schedule", "accumulation")},
        "data.batch_size": config.data.batch_size,
        "data.halves": config.halves,
        "parallel.lanes": config.parallel.lanes,
        "run.seed": config.run.seed,
        "hash of data.shards": stream_sha256,
    }


def _save(trainer: Trainer, stream: TrainStream, path: Path, step: int, seconds: float, best: dict[str, Any] | None) -> None:
    """Write a checkpoint from all ranks; a best one holds weights without moments."""
    config, ranks = trainer.config, trainer.ranks
    epoch, within = divmod(step, stream.steps_per_epoch)
    header = {
        "position": {"epoch": epoch, "step_in_epoch": within, "step": step},
        "config": asdict(config),
        "must_match": _must_match(config, stream.manifest.shards_sha256),
        "vocabulary_sha256": stream.manifest.vocabulary_sha256,
        "shards_sha256": stream.manifest.shards_sha256,
        "n_items": stream.n_items,
        "layout": {**asdict(ranks.layout), "zero_stage": config.parallel.zero_stage},
        "optimizer": trainer.optimizer_scalars(),
        "seconds_training": seconds,
        "best": best,
    }
    moments = path.name.startswith("step-")
    checkpoints.save(path, header, trainer.item_pieces(moments), trainer.trunk_tensors(moments), ranks)


def _resume(trainer: Trainer, stream: TrainStream, folder: Path, ranks: Ranks) -> tuple[int, float, dict[str, Any] | None]:
    """Load the newest checkpoint: (steps done, seconds of training so far, best validation metrics)."""
    opened: Checkpoint | None = None
    with agreed(ranks):
        path = checkpoints.newest(folder)
        if path is not None:
            opened = checkpoints.open_checkpoint(path)
            _check_same_run(trainer.config, stream, opened)
    if opened is None:
        return 0, 0.0, None
    checkpoints.verify(opened, ranks)
    with agreed(ranks):
        checkpoints.read_items(opened, trainer.item_pieces(True))
        if trainer.trunk:
            trainer.trunk.load(checkpoints.read_trunk(opened))
    trainer.load_scalars(opened.header["optimizer"], max(opened.step - 1, 0) // stream.steps_per_epoch)
    return opened.step, opened.header.get("seconds_training", 0.0), opened.header.get("best")


def _check_same_run(config: Config, stream: TrainStream, opened: Checkpoint) -> None:
    before, now = opened.header["must_match"], json.loads(json.dumps(_must_match(config, stream.manifest.shards_sha256)))
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        changes = "; ".join(f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in different)
        raise ValueError(f"{opened.path} cannot be resumed: {changes}; set it back, or start a new run.dir")
    if opened.step > total_steps(config, stream.steps_per_epoch):
        raise ValueError(
            f"{opened.path} is at step {opened.step}, beyond the {total_steps(config, stream.steps_per_epoch)} steps asked for; "
            "lengthen optimizer.schedule or run.max_steps, or start a new run.dir"
        )


# --- evaluation and words ----------------------------------------------------------------------------------------------


def _validate(trainer: Trainer, stream: TrainStream, ranks: Ranks) -> dict[str, Any] | None:
    """Metrics on validation; None where no user of it can be scored."""
    if stream.manifest.splits["validation"].users == 0:
        return None
    with trainer.evaluating() as trunk:
        metrics = evaluate(model_scorer(trainer.model, trunk), stream.folder, "validation", ranks).result()
    return metrics if metrics["n_users"] else None


def _result(config: Config, ranks: Ranks, seconds: float, epochs: float) -> dict[str, Any]:
    loaded = load_model(config.run.dir, None, ranks)
    result: dict[str, Any] = {}
    for split in ("validation", "test"):
        metrics = None
        if Manifest.load(config.data.shards).splits[split].users:
            metrics = evaluate(model_scorer(loaded.model, loaded.trunk), config.data.shards, split, ranks).result()
        result[split] = metrics
    return {
        **result,
        "seconds_training": seconds,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "world_size": ranks.world_size,
        "checkpoint": loaded.checkpoint.path.resolve().name,
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


def _opening(config: Config, stream: TrainStream, trainer: Trainer, step: int, last: int) -> str:
    n_items = sum(p.tensor.numel() for p in trainer.model.slices())
    n_trunk = trainer.trunk.n_parameters if trainer.trunk else 0
    layout = trainer.ranks.layout
    return (
        f"{config.model.kind} on {stream.n_users:,} users and {stream.n_items:,} items: {n_items / 1e6:.1f}M item parameters on this rank, "
        f"{n_trunk / 1e6:.1f}M in the trunk; {layout.partitions} partitions x {layout.replicas} replicas on {trainer.ranks.device.type}; "
        f"steps {step + 1} to {last}, {stream.steps_per_epoch} an epoch" + (f" (resumed from step {step})" if step else "")
    )
