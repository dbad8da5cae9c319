"""Train in this process, for `Recommender.fit`: one rank, without a launcher or a process group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_vasp.config.checks import check
from dist_vasp.config.command_line import from_dict, load
from dist_vasp.config.schema import Config
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.launched import launched_world
from dist_vasp.parallel.partition import Layout
from dist_vasp.parallel.start import resolve_device
from dist_vasp.training.train import train


def train_here(shards: str | Path, config: Any, run_dir: str | Path) -> None:
    """Train the model of `config` on `shards` in `run_dir`, resuming what is there.

    KeyboardInterrupt where a signal stopped the run: it is saved then. ValueError for what a user
    can fix.
    """
    ready = _configuration(shards, config, run_dir)
    if launched_world().world_size > 1:
        raise ValueError(
            "Recommender.fit trains in one process, but this one is one of several ranks; use "
            "launch/train.py there"
        )
    layout = Layout.of(1, ready.parallel.partitions, ready.parallel.replicas)
    ranks = form_groups(0, layout, resolve_device(ready.device, 0))
    if train(ready, ranks) is None:
        raise KeyboardInterrupt(f"{run_dir} is saved; the same call resumes there")


def _configuration(shards: str | Path, config: Any, run_dir: str | Path) -> Config:
    """Return the checked configuration with this data folder and run directory."""
    for name, value in (("shards", shards), ("run_dir", run_dir)):
        if not isinstance(value, str | os.PathLike):
            raise ValueError(f"{name} is {value!r:.80}, expected the path of a folder")
    if isinstance(config, str | os.PathLike):
        read = load(Path(config))
    elif isinstance(config, Mapping):
        read = from_dict(dict(config))
    else:
        raise ValueError(
            f"config is of type {type(config).__name__}, expected the path of a YAML file, or a "
            'mapping of sections such as {"model": {"kind": "ease"}}'
        )
    if read.ratings:
        raise ValueError(
            "data.ratings is true, but a Recommender reads histories without ratings; leave it out"
        )
    data, run = replace(read.data, shards=str(shards)), replace(read.run, dir=str(run_dir))
    return check(replace(read, data=data, run=run))
