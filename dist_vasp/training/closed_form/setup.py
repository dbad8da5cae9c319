"""The closed form before there is a matrix: what is checked, what a dry run tells, and what an
earlier start has left."""

from __future__ import annotations

import json
from pathlib import Path

from dist_vasp.bounded_json import read_json, reason
from dist_vasp.checkpoint import folder as folders
from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import Manifest
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_gather_bytes
from dist_vasp.plan.estimate import make_plan
from dist_vasp.plan.terms import Device, Sizes
from dist_vasp.training.closed_form.auxiliary import Overlap
from dist_vasp.training.closed_form.fit import ClosedFormFit, must_match_of, opening
from dist_vasp.training.closed_form.settings import (
    Tried,
    largest,
    n_settings,
    no_validation,
    read_tried,
)
from dist_vasp.training.closed_form.through_host import place
from dist_vasp.training.floor import measure_rates
from dist_vasp.training.run import Run
from dist_vasp.training.state import check_same, newest_checkpoint
from dist_vasp.training.trained_users import Users


class ClosedFormSetup:
    """The closed form, before there is a matrix; see `FitSetup`."""

    keep = 1
    earlier_users: Users | None = None

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.manifest = Manifest.load(config.data.shards)
        self._config = config
        self.folders: tuple[tuple[str, Manifest], ...] = ((config.data.shards, self.manifest),)
        self._overlap: Overlap | None = None
        if config.data.auxiliary:
            self._overlap = Overlap(config, self.manifest)
            self.folders += ((config.data.auxiliary, self._overlap.manifest),)
        self.ranks, self._gpu = place(config, self.manifest, ranks)
        self.device = self._gpu.device if self._gpu else ranks.device
        splits = self.manifest.splits
        if splits["train"].users < 1:
            raise ValueError(
                f"{config.data.shards} has no training users; "
                "prepare the data with fewer val_users and test_users"
            )
        if n_settings(config) > 1 and not splits["validation"].users:
            raise ValueError(no_validation(config))
        ranks.partition_of_items(self.manifest.n_items)

    def check(self) -> None:
        """Nothing more than was checked when the folders were opened."""

    def describe(self) -> str:
        config, layout = self._config, self.ranks.layout
        device = self.device
        train, n_items = self.manifest.splits["train"], self.manifest.n_items
        rates = measure_rates(device, min(n_items, 1 << 14))
        sizes = Sizes(n_items, train.interactions / max(train.users, 1), train.users)
        plan = make_plan(
            largest(config), sizes, layout.partitions, layout.replicas, rates, Device(device.type)
        )
        parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in plan.memory.items())
        n = n_settings(config)
        settings = "one setting" if n == 1 else f"each of at most {n} settings"
        interactions = f"{train.interactions:,} interactions"
        return (
            f"{opening(config, self.manifest, self.ranks, interactions)}\n{self._on_host()}"
            f"memory of a rank, {layout.partitions} partitions: "
            f"{plan.memory_total / 1e9:.2f} GB ({parts})\n"
            f"time for {settings}, evaluation excluded: about {plan.step_seconds:,.0f} s "
            f"at the {rates.flops / 1e9:.0f} GFLOP/s measured now"
        )

    def _on_host(self) -> str:
        """A line for a matrix that the host holds, or ""."""
        if self._gpu is None:
            return ""
        return (
            f"the item weights do not fit {self._gpu.device} and lie in this machine's memory; the "
            "time of copying them there and back is not in the estimate\n"
        )

    def start(self, run: Run) -> ClosedFormFit:
        """Read the header of the best setting so far, if there is one, and what was tried."""
        config, ranks = run.config, run.ranks
        found: Header | None = None
        seconds, is_done = 0.0, False
        folder = Path(config.run.dir)
        opened = folders.open_together(
            lambda: newest_checkpoint(run.checkpoints), open_checkpoint, ranks
        )
        tried: dict[int, Tried] = {}
        with agreed(ranks):
            if opened is not None:
                matching = must_match_of(config, self.manifest, self._overlap)
                check_same(opened, matching, self.manifest)
                found = opened.header
                opened.close()
                seconds = found.seconds_training
                is_done = (folder / "result.json").is_file()
                if is_done:
                    seconds = _seconds(folder / "result.json")  # of settings after the best, too
                elif ranks.is_main:
                    tried = _tried(folder, config, found)
        tried = _of_rank_0(tried, ranks)
        return ClosedFormFit(run, found, seconds, is_done, tried, self._overlap, self._gpu)


def _tried(folder: Path, config: Config, best: Header) -> dict[int, Tried]:
    """Return the settings that an earlier start has tried, by their number."""
    if best.best is None:
        return {}
    best_by = config.run.best_by
    path = folder / "metrics.jsonl"
    return read_tried(path, best_by, best.position.step, best.best[best_by])


def _of_rank_0(tried: dict[int, Tried], ranks: Ranks) -> dict[int, Tried]:
    """Return rank 0's settings on every rank: another host may read an older file."""
    message = json.dumps([[step, one.value, one.seconds] for step, one in tried.items()])
    sent = all_gather_bytes(message.encode(), ranks.world, ranks.device, capacity=1 << 30)
    return {step: Tried(value, seconds) for step, value, seconds in json.loads(sent[0])}


def _seconds(result: Path) -> float:
    try:
        return float(read_json(result)["seconds_training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{result} cannot be read ({reason(error)}); "
            "remove it, and the same command resumes the search"
        ) from None
