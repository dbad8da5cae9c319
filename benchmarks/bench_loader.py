"""One epoch of the loader alone, as a rank that computes nothing would see it: python -m
benchmarks.bench_loader --shards DIR"""

from __future__ import annotations

import argparse
import time
from statistics import median

from dist_vasp.data.stream import StreamOptions, TrainStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=48)
    parser.add_argument("--no_halves", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    rates = []
    for epoch in range(arguments.rounds):
        start = time.perf_counter()
        options = StreamOptions(
            arguments.batch_size, arguments.lanes, halves=not arguments.no_halves
        )
        stream = TrainStream(arguments.shards, options)
        first = epoch * stream.steps_per_epoch
        users = items = 0
        for batch in stream.batches(first, first + stream.steps_per_epoch, arguments.workers):
            users += batch.n_users
            items += len(batch.inputs.items)
        seconds = time.perf_counter() - start
        assert users == stream.n_users, (users, stream.n_users)
        rates.append(users / seconds)
        print(
            f"epoch {epoch}: {users:,} users, {items:,} input items, "
            f"{seconds:.2f} s, {users / seconds:,.0f} users/s",
            flush=True,
        )
    print(
        f"{arguments.workers} workers, batches of {arguments.batch_size}: median "
        f"{median(rates):,.0f} users/s"
    )


if __name__ == "__main__":
    main()
