"""What is checked before a run takes its folder: cheap questions first, hours of training later."""

from __future__ import annotations

from pathlib import Path

import psutil

from dist_vasp.config.schema import Config
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.shard import read_shard
from dist_vasp.model.build import measure_size
from dist_vasp.model.slices import BLOCK_COLUMNS
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.parallel.launched import launched_world
from dist_vasp.progress import Progress
from dist_vasp.tensor_file import MOST_TENSORS


def check_folders(config: Config) -> None:
    """Raise ValueError unless the data folder and the run's folder are given, and differ."""
    if not config.data.shards:
        raise ValueError(
            "data.shards is not set; pass --data.shards with a folder written by "
            "`python -m data_tools.shard`"
        )
    if not config.run.dir:
        raise ValueError(
            "run.dir is not set; pass --run.dir with the folder that should hold the run"
        )
    for key, folder in (("shards", config.data.shards), ("auxiliary", config.data.auxiliary)):
        if folder and Path(config.run.dir).resolve() == Path(folder).resolve():
            raise ValueError(
                f"run.dir and data.{key} are both {config.run.dir}; a run needs a folder of its own"
            )


def check_shards(folder: str | Path, manifest: Manifest, ranks: Ranks) -> None:
    """Read every shard once; the ranks share them out. AgreedError names the damaged one."""
    with agreed(ranks):
        shards = [(split, entry) for split in SPLITS for entry in manifest.splits[split].shards]
        mine = shards[ranks.rank :: ranks.world_size]
        progress = Progress("checking shards", len(mine), "shard", show=ranks.is_main, brief=True)
        for done, (split, entry) in enumerate(mine):
            read_shard(folder, split, entry, manifest.n_items)
            progress.update(done + 1)
        progress.close()


def check_memory(config: Config, n_items: int, ranks: Ranks) -> None:
    """Raise ValueError where the bare fp32 weights of this machine's ranks exceed its memory, or W
    has more blocks than a file may hold.

    `launch/plan.py` estimates the rest.
    """
    model = config.model
    owned = -(-n_items // ranks.layout.partitions)
    columns = config.parallel.block_columns or BLOCK_COLUMNS
    # W, its moments and its start lie in one file of each partition.
    size = measure_size(config, n_items, ranks.layout.partitions)
    blocks = -(-owned // columns) * size.matrices
    if 4 * blocks > MOST_TENSORS // 2:
        raise ValueError(
            f"parallel.block_columns is {columns}, which cuts the W of {owned:,} items into "
            f"{blocks:,} blocks, expected at most {MOST_TENSORS // 8:,}; raise it"
        )
    if ranks.device.type != "cpu":
        return
    needed = 4 * size.parameters * launched_world()[3]
    there = psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"the weights of model.hidden {model.hidden} and model.latent {model.latent} on "
            f"{n_items:,} items take {needed / 1e9:,.0f} GB on this machine, which has "
            f"{there / 1e9:,.0f} GB; lower them or start more machines, "
            "python launch/plan.py says how many"
        )
