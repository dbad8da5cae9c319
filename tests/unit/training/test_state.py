"""Saving a run and keeping its best checkpoint, whatever a kill has left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Position
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.config.schema import Config, OptimizerConfig, RunConfig, Stage
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.training.state import RunState, Saver, must_match, total_steps


def saver(folder: Path, keep: int = 2) -> Saver:
    """A Saver of a trainer with one small matrix."""
    trainer = SimpleNamespace(
        config=Config(run=RunConfig(keep=keep)),
        ranks=form_groups(0, Layout(1, 1, 1), torch.device("cpu")),
        item_pieces=lambda moments: [ItemSlice("input.weight", 0, 3, 0, torch.ones(3, 2))],
        trunk_tensors=lambda moments: {},
        optimizer_scalars=lambda: {"step": 1.0, "mu_product": 0.5},
    )
    manifest = SimpleNamespace(
        n_items=3, shards_sha256="s", data_sha256="d", vocabulary_sha256="v", positives=None
    )
    return Saver(
        trainer,
        SimpleNamespace(steps_per_epoch=4, manifest=manifest, n_items=3),
        folder,
        lambda _: None,
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_checkpoints_hold_the_position_and_the_best(tmp_path):
    save = saver(tmp_path)
    state = RunState(6, 12.5, {"ndcg@100": 0.25}, evaluation_due=True)
    save.save(state)
    save.finish()
    header = open_checkpoint(tmp_path / "step-00000006").header
    assert header.position == Position(1, 2, 6)
    assert (header.seconds_training, header.best, header.evaluation_due) == (
        12.5,
        {"ndcg@100": 0.25},
        True,
    )
    assert header.must_match == must_match(save.trainer.config, "s")


def test_old_steps_go_when_the_new_one_is_whole(tmp_path):
    save = saver(tmp_path)
    for step in (1, 2, 3):  # a slow disk: all three are under way at once
        save.save(RunState(step))
    save.finish()
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    assert save.written


def test_best_follows_the_best(tmp_path):
    save = saver(tmp_path)
    for step in (2, 5):
        save.save_best(RunState(step, attempt="a"))
        save.finish()
        assert folders.find(tmp_path).name == f"best-{step:08d}"
    assert names(tmp_path) == ["best", "best-00000005"]
    assert open_checkpoint(tmp_path / "best").header.attempt == "a"


def test_total_steps():
    config = Config(optimizer=OptimizerConfig(schedule=[Stage(2, 0.1), Stage(3, 0.1)]))
    assert total_steps(config, 7) == 35
    for max_steps, expected in ((0, 35), (10, 10), (99, 35)):
        assert (
            total_steps(Config(optimizer=config.optimizer, run=RunConfig(max_steps=max_steps)), 7)
            == expected
        )


def test_what_must_match_leaves_out_what_may_change():
    free = [
        "schedule",
        "accumulation",
        "partitions",
        "replicas",
        "zero_stage",
        "precision",
        "trunk_dtype",
        "workers",
        "shards",
        "max_steps",
        "keep",
    ]
    keys = must_match(Config(), "s")
    assert not [key for key in keys if key.split(".")[-1] in free and key != "hash of data.shards"]
    assert {
        "model.hidden",
        "loss.gamma",
        "optimizer.beta1",
        "data.batch_size",
        "data.halves",
        "data.input_dropout",
        "parallel.lanes",
        "run.seed",
    } <= keys.keys()
    assert keys["hash of data.shards"] == "s"
