"""What a configuration needs: its data, room for its checkpoints, memory for its plan."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from dist_vasp.checkpoint import folder as folders
from dist_vasp.config.schema import Config
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.shard import read_shard
from dist_vasp.doctor.findings import Finding, error, ok, warning
from dist_vasp.doctor.machine import available_memory
from dist_vasp.model.build import measure_size
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.partition import ItemPartition, Layout
from dist_vasp.plan.estimate import make_plan, smallest_that_fits
from dist_vasp.plan.terms import CPU, Device, Sizes
from dist_vasp.training.closed_form.auxiliary import Overlap
from dist_vasp.training.closed_form.settings import largest
from dist_vasp.training.closed_form.through_host import is_exact
from dist_vasp.training.tracking import services

_SHARD_AGAIN = (
    "shard the data again, or copy the folder again: python -m data_tools.verify names every fault"
)


def check_job(
    config: Config,
    ranks: int,
    local_ranks: int,
    checksums: bool,
    progress: Callable[[int, int], None],
) -> Iterator[Finding]:
    """Yield findings on this configuration with `ranks` ranks, `local_ranks` of them here."""
    config, manifest = largest(config), None
    if config.data.shards:
        found = _shards(config.data.shards, checksums, progress)
        yield found[0]
        manifest = found[1]
        if manifest and config.data.auxiliary:
            yield _auxiliary(config, manifest, checksums, progress)
    else:
        yield warning(
            "shards",
            "data.shards is not set, so neither data nor plan are checked",
            "pass --data.shards DIR",
        )
    layout = None
    try:
        layout = Layout.of(ranks, config.parallel.partitions, config.parallel.replicas)
        if manifest:
            ItemPartition(manifest.n_items, layout.partitions, 0)
        if config.parallel.lanes % ranks and not kind_of(config.model.kind).closed_form:
            raise ValueError(
                f"parallel.lanes is {config.parallel.lanes}, which is no multiple of {ranks} "
                "ranks; choose one"
            )
    except ValueError as raised:
        yield error("layout", *_two(str(raised)))
        layout = None
    if layout:
        yield ok("layout", f"{layout.partitions} partitions x {layout.replicas} replicas")
    if manifest and layout:
        train = manifest.splits["train"]
        sizes = Sizes(manifest.n_items, train.interactions / max(train.users, 1), train.users)
        yield _plan(config, sizes, layout, local_ranks)
        yield _disk(config, manifest.n_items)
    elif config.run.dir:
        yield _disk(config, 0)
    if config.run.wandb or config.run.mlflow:
        try:
            services(Path(config.run.dir or "."), config)
            yield ok(
                "tracking",
                ", ".join(name for name in ("wandb", "mlflow") if getattr(config.run, name)),
            )
        except ValueError as raised:
            yield error("tracking", *_two(str(raised)))


def _shards(
    folder: str, checksums: bool, progress: Callable[[int, int], None]
) -> tuple[Finding, Manifest | None]:
    """Check manifest, vocabulary and every shard: its size, or with `checksums` its content."""
    try:
        manifest = Manifest.load(folder)
        load_items(folder, manifest)
        entries = [(split, entry) for split in SPLITS for entry in manifest.splits[split].shards]
        for _, entry in entries:
            path = Path(folder) / entry.name
            size = path.stat().st_size if path.is_file() else None
            if size != entry.bytes:
                raise ValueError(
                    f"{path} has {size if size is not None else 'no'} bytes, the manifest says "
                    f"{entry.bytes}"
                )
        for done, (split, entry) in enumerate(entries if checksums else []):
            read_shard(folder, split, entry, manifest.n_items)
            progress(done + 1, len(entries))
    except (ValueError, OSError) as raised:
        return error("shards", str(raised), _SHARD_AGAIN), None
    users = ", ".join(f"{manifest.splits[split].users:,} {split}" for split in SPLITS)
    how = (
        "every byte verified"
        if checksums
        else "sizes agree with the manifest; --checksums reads every byte"
    )
    if not manifest.splits["validation"].users and config_needs_validation(manifest):
        return warning(
            "shards",
            f"{folder} has no validation users",
            "shard with --val_users or --val_fraction to choose the best checkpoint",
        ), manifest
    return ok(
        "shards", f"{manifest.n_items:,} items, users: {users}; {len(entries)} shards, {how}"
    ), manifest


def _auxiliary(
    config: Config, manifest: Manifest, checksums: bool, progress: Callable[[int, int], None]
) -> Finding:
    """Check the folder of data.auxiliary, and that it has users and items of the other."""
    found, theirs = _shards(config.data.auxiliary, checksums, progress)
    if theirs is None:
        return error("auxiliary", found.text, found.do)
    try:
        overlap = Overlap(config, manifest)
    except ValueError as raised:
        return error("auxiliary", *_two(str(raised)))
    n_users, of = overlap.n_users, manifest.splits["train"].users
    return ok("auxiliary", f"{n_users:,} of {of:,} training users are in {config.data.auxiliary}")


def config_needs_validation(manifest: Manifest) -> bool:
    """Return whether data should have validation users: it should where users are split."""
    return manifest.preparation.get("protocol") in ("liang", "hashed")


def _plan(config: Config, sizes: Sizes, layout: Layout, local_ranks: int) -> Finding:
    on_cuda = config.device != "cpu" and torch.cuda.is_available()
    device = CPU
    if on_cuda:
        room = min(
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
        device, where = Device("cuda", room), "of a device"
    else:
        room = available_memory()[0] // max(local_ranks, 1)
        where = "free here for each rank"
    plan = make_plan(config, sizes, layout.partitions, layout.replicas, None, device)
    need = plan.memory_total
    text = f"a rank needs about {need / 1e9:.2f} GB at its peak, {room / 1e9:.2f} GB {where}"
    if need > room and on_cuda and layout.world_size == 1 and is_exact(config):
        return warning(
            "plan",
            f"{text}: the matrix will lie in this machine's memory, copied to the device in panels",
            "start a rank on each of several devices, or set model.neighbours",
        )
    if need > room:
        fits = smallest_that_fits(config, sizes, room, None, device)
        do = (
            f"use {fits.partitions} partitions or more"
            if fits
            else "no partitioning fits: lower model.hidden or data.batch_size"
        )
        return error("plan", text, f"{do}; launch/plan.py says what the memory is for")
    if need > 0.85 * room:
        return warning(
            "plan", f"{text}: little is left", "use one partition more, or fewer ranks on a machine"
        )
    return ok("plan", text)


def _disk(config: Config, n_items: int) -> Finding:
    """Check the free space of the run folder.

    It takes the kept checkpoints with their moments, one that is being written, and the best one
    without moments.
    """
    folder = Path(config.run.dir) if config.run.dir else None
    if folder is None:
        return warning("run.dir", "run.dir is not set", "pass --run.dir DIR")
    there = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return error("run.dir", f"{there} cannot be written", "choose another run.dir")
    # Without shards only the trunk counts, which one item hardly changes.
    weights = 4 * measure_size(config, max(n_items, 1)).parameters
    moments = 0 if kind_of(config.model.kind).closed_form else 2
    needed = weights * ((1 + moments) * (config.run.keep + 1) + 2)
    free = shutil.disk_usage(there).free
    newest = folders.newest(folder / "checkpoints")
    state = f"would resume from {newest.name}" if newest else "a new run"
    text = (
        f"{folder}: {state}, {free / 1e9:.1f} GB free, the checkpoints take up to "
        f"{needed / 1e9:.2f} GB"
    )
    if free < weights * (1 + moments):
        return error(
            "run.dir", f"{text}: not even one fits", "free some space, or choose another run.dir"
        )
    if free < needed:
        return warning("run.dir", text, "free some space, or lower run.keep")
    return ok("run.dir", text)


def _two(text: str) -> tuple[str, str]:
    """Split one of our messages into what is wrong and, after the last semicolon, what to do."""
    said, _, do = text.rpartition("; ")
    return (said, do) if said else (text, "")
