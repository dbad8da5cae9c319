"""Lists from an exported model on one process: python -m benchmarks.bench_recommender FOLDER [--run
RUN --histories FILE.parquet]

With `--run` the model is that run's, exported into FOLDER/model, and the histories are the file's.
Without, it is one of Gowalla's shape with random weights.

Writes a run of that shape (W alone has 6.7 GB) into FOLDER, a block at a time, exports it, drops
the run, and recommends from the mapped export: users a second and memory, with the files in the
page cache and out of it, by users per pass. Everything is deleted at the end. `RssAnon` is memory
that the process owns; `RssFile` are pages of the mapped files, which the system takes back.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from data_tools.synthesize import blocks
from dist_vasp import Recommender
from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.model.build import make_trunk
from dist_vasp.model.slices import ItemSlice
from dist_vasp.ranking import make_lists as module
from tests.support.runs import write_checkpoint, write_items


def resident() -> dict[str, float]:
    """RssAnon and RssFile of this process, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


class Peak:
    """The largest RssAnon and RssFile while it is on, looked at 50 times a second."""

    def __enter__(self) -> Peak:
        self.seen, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.seen = {name: max(self.seen[name], value) for name, value in resident().items()}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:,.0f} MB" for name, value in self.seen.items())


def random_run(folder: Path, n_items: int, hidden: int, latent: int) -> None:
    """A vasp run whose matrices are windows of one buffer of random numbers: none is held."""
    numbers = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02

    def window(rows: int, columns: int, start: int) -> torch.Tensor:
        step = min(columns, (len(numbers) - start - columns) // rows)
        return numbers[start:].as_strided((rows, columns), (step, 1), start)

    config = Config(model=ModelConfig(hidden=hidden, latent=latent))
    bias = torch.zeros(n_items)
    pieces = [
        ItemSlice("input.weight", 0, n_items, 0, window(n_items, hidden, 0)),
        ItemSlice("output.decoder.weight", 0, n_items, 0, window(n_items, hidden, 1001)),
        ItemSlice("output.decoder.bias", 0, n_items, 0, bias),
        ItemSlice("output.latent.weight", 0, n_items, 0, window(n_items, latent, 2003)),
        ItemSlice("output.latent.bias", 0, n_items, 0, bias),
    ]
    for lo in range(0, n_items, 256):
        hi = min(lo + 256, n_items)
        pieces.append(
            ItemSlice("output.nease.weight", lo, hi, 1, window(n_items, hi - lo, 3001 + 7 * lo))
        )
    trunk = {name: p.detach() for name, p in make_trunk(config.model, 0).named_parameters()}
    folder.mkdir(parents=True)
    write_checkpoint(
        folder, config, n_items, write_items(folder, list(range(1, n_items + 1))), trunk, [pieces]
    )


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache: the next reading comes from the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(what: str, work, n_users: int = 0):
    with Peak() as peak:
        start = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - start
    rate = f", {n_users / seconds:,.0f} users/s" if n_users else ""
    print(f"{what}: {seconds:.2f} s{rate}; at most {peak}", flush=True)
    return result


def of_a_run(arguments: argparse.Namespace) -> None:
    """Export a trained run and make the lists of a file from the mapped export."""
    model, table = arguments.folder / "model", pq.read_table(arguments.histories)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    n_users = pc.count_distinct(table["user"]).as_py()
    print(
        f"{torch.get_num_threads()} threads, {n_users:,} users, {len(table):,} "
        f"interactions; at rest {resident()}"
    )
    try:
        timed("export the run", lambda: Recommender.load(arguments.run, verify=False).export(model))
        forget(model)
        r = timed(
            "load the export from disk, checksums and numbers", lambda: Recommender.load(model)
        )
        for again in ("first", "again"):
            lists = timed(f"recommend, {again}", lambda: r.recommend(table, arguments.k), n_users)
            print(f"lists: {lists.ids.shape}, {int((lists.ids < 0).sum())} places empty")
    finally:
        shutil.rmtree(model, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=29_858)
    parser.add_argument("--items", type=int, default=40_981)
    parser.add_argument("--interactions", type=int, default=810_128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--latent", type=int, default=256)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--users_per_pass", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument(
        "--run", type=Path, help="a trained run in place of random weights; it is only read"
    )
    parser.add_argument(
        "--histories", type=Path, help="Parquet with columns user and item; needs --run"
    )
    arguments = parser.parse_args()
    if arguments.run:
        of_a_run(arguments)
        return
    run, model = arguments.folder / "run", arguments.folder / "model"
    table = pa.Table.from_batches(
        list(blocks(arguments.users, arguments.items, arguments.interactions, 0))
    )
    print(f"{torch.get_num_threads()} threads; at rest {resident()}")
    try:
        timed(
            "write a run",
            lambda: random_run(run, arguments.items, arguments.hidden, arguments.latent),
        )
        r = timed("load the run, checksums and numbers", lambda: Recommender.load(run))
        timed("export", lambda: r.export(model))
        del r
        shutil.rmtree(run)
        forget(model)
        timed("load the export from disk, checksums and numbers", lambda: Recommender.load(model))
        timed("load it again, from the page cache", lambda: Recommender.load(model))
        r = timed("load it without checks", lambda: Recommender.load(model, verify=False))
        for users in arguments.users_per_pass:
            module.USERS_PER_PASS = users
            ids, _ = timed(
                f"recommend, {users} users per pass, page cache",
                lambda: r.recommend(table, arguments.k),
                arguments.users,
            )
        one = [np.asarray(table["item"])[:34].tolist()]
        for what, work in {
            "one user": lambda r: r.recommend(one, arguments.k),
            "explain one item": lambda r: r.explain(one[0], int(ids[0, 0])),
            "similar items": lambda r: r.similar_items(one[0][0], 10),
            f"recommend all, {users} users per pass": lambda r: r.recommend(table, arguments.k),
        }.items():
            del r
            forget(model)
            r = Recommender.load(model, verify=False)
            timed(f"{what}, from disk", lambda work=work, r=r: work(r))
            timed(f"{what}, again", lambda work=work, r=r: work(r))
    finally:
        shutil.rmtree(run, ignore_errors=True)
        shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    main()
