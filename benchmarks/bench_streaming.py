"""Does launch/recommend.py hold a block or the users? python -m benchmarks.bench_streaming FOLDER
--users 1000000

Synthetic histories and a model of random weights are written into FOLDER; the command then runs in
a process of its own, whose resident memory is read ten times a second. Everything is deleted at the
end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench_recommender import random_run
from data_tools.synthesize import synthesize
from tests.support.jobs import environment
from tests.support.paths import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--output", default="lists.parquet", help="its ending is the format")
    parser.add_argument("--explain", type=int, default=0)
    parser.add_argument(
        "--shuffle", action="store_true", help="scatter the rows of every user over the file"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    try:
        synthesize(
            folder / "histories.parquet",
            arguments.users,
            arguments.items,
            arguments.interactions,
            0,
        )
        if arguments.shuffle:
            table = pq.read_table(folder / "histories.parquet")
            order = np.random.default_rng(0).permutation(len(table))
            pq.write_table(table.take(pa.array(order)), folder / "histories.parquet")
            del table, order
        random_run(folder / "run", arguments.items, 128, 64)
        line = [
            "--run",
            folder / "run",
            "--histories",
            folder / "histories.parquet",
            "--output",
            folder / arguments.output,
        ]
        line += ["--k", 20, "--explain", arguments.explain, "--device", "cpu"]
        command = [sys.executable, "-u", str(ROOT / "launch" / "recommend.py"), *map(str, line)]
        start = time.monotonic()
        job = subprocess.Popen(
            command, env=environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True
        )
        process, lines, memory = psutil.Process(job.pid), [], []

        def watch() -> None:
            while job.poll() is None:
                with contextlib.suppress(psutil.Error):
                    memory.append((time.monotonic() - start, process.memory_info().rss / 1e6))
                time.sleep(0.1)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert job.stdout is not None
        for text in job.stdout:
            print(f"{time.monotonic() - start:6.1f} s  {text}", end="", flush=True)
            if found := re.match(r"recommending: (\d+)/(\d+)", text):
                lines.append((time.monotonic() - start, int(found[1]) / int(found[2])))
        assert job.wait() == 0
        watcher.join()
        (t0, f0), (t1, f1) = lines[0], lines[1]
        lines.insert(
            0, (t0 - f0 * (t1 - t0) / (f1 - f0), 0.0)
        )  # progress is told every ten seconds; between them it is even
        memory = [pair for pair in memory if pair[0] <= lines[-1][0]]  # later it is on its way out
        share = np.interp([t for t, _ in memory], *zip(*lines, strict=True))
        for percent in (10, 25, 50, 75, 100):
            print(
                f"resident at {percent}%: "
                f"{memory[int(np.searchsorted(share, min(percent / 100, share[-1])))][1]:.0f} MB"
            )
        print(f"{os.path.getsize(folder / arguments.output) / 1e6:,.0f} MB written")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
