"""Our step against the dense reference of tests/oracles/dense.py, alternating in one run: python -m
benchmarks.bench_dense --config X.yaml ...

Each side lives in a process of its own, so that each has its own peak memory; they take the same
batches in turn, one at a time. Reading a batch is not timed, as loaders do it ahead; what a side
makes of it is.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import time
from statistics import median

import torch

from dist_vasp.config import command_line as configs
from dist_vasp.config.schema import Config
from dist_vasp.data.rows import Rows
from dist_vasp.data.stream import Batch, StreamOptions, TrainStream
from dist_vasp.model.build import make_trunk
from dist_vasp.parallel.start import init_ranks
from tests.oracles.dense import TORCH_OPTIMIZERS, DenseVASP


def _stream(config: Config) -> TrainStream:
    d = config.data
    options = StreamOptions(
        d.batch_size, config.parallel.lanes, config.run.seed, config.halves, d.input_dropout
    )
    return TrainStream(d.shards, options)


def _dense_rows(rows: Rows, n_items: int) -> torch.Tensor:
    """(n, I), as quickly as plain torch can."""
    dense = torch.zeros(rows.n_rows, n_items)
    of_row = torch.repeat_interleave(torch.arange(rows.n_rows), torch.from_numpy(rows.lengths))
    dense[of_row, torch.from_numpy(rows.items).long()] = 1
    return dense


def _ours(config: Config, threads: int):
    from dist_vasp.training.step.engine import Trainer

    ranks = init_ranks(device="cpu", threads=threads)
    stream = _stream(config)
    trainer = Trainer(config, stream.n_items, ranks)
    return stream.batch, lambda batch: trainer.step(batch).loss


def _dense(config: Config, threads: int):
    """Plain torch: dense x and y, autograd, torch.optim with its defaults, the diagonal zeroed
    after the step, gradients set to None."""
    torch.set_num_threads(threads)
    stream, m = _stream(config), config.model
    I, generator = stream.n_items, torch.Generator().manual_seed(0)

    def glorot(rows: int, columns: int) -> torch.Tensor:
        return (torch.rand(rows, columns, generator=generator) * 2 - 1) * (
            6 / (rows + columns)
        ) ** 0.5

    parameters = {
        "input.weight": glorot(I, m.hidden),
        "output.decoder.weight": glorot(I, m.hidden),
        "output.decoder.bias": torch.zeros(I),
    }
    parameters |= {
        "output.latent.weight": glorot(I, m.latent),
        "output.latent.bias": torch.zeros(I),
    }
    parameters["output.nease.weight"] = glorot(I, I).fill_diagonal_(0)
    trunk = make_trunk(m, 0)
    assert trunk is not None
    dense = DenseVASP(
        "vasp",
        parameters | {f"trunk.{n}": p for n, p in trunk.named_parameters()},
        m.encoder_layers,
        m.decoder_layers,
    )
    parameters.clear()
    optimizer = TORCH_OPTIMIZERS[config.optimizer.name](
        list(dense.parameters.values()), config.lr(0)
    )

    def step(batch: Batch) -> float:
        x, y = (_dense_rows(rows, I) for rows in (batch.inputs, batch.targets))
        optimizer.zero_grad(set_to_none=True)
        reconstruction, kl = dense.loss(
            x, y, torch.randn(len(x), m.latent, generator=generator), config.loss.kind
        )
        (reconstruction + kl).backward()
        optimizer.step()
        with torch.no_grad():
            dense.parameters["output.nease.weight"].fill_diagonal_(0)
        return float(reconstruction.detach() + kl.detach())

    return stream.batch, step


def _serve(make, config: Config, threads: int, pipe) -> None:
    read, step = make(config, threads)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        batch = read(number)
        start = time.perf_counter()
        loss = step(batch)
        pipe.send(
            (
                time.perf_counter() - start,
                loss,
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments, rest = parser.parse_known_args()
    config, _ = configs.parse(
        configs.make_parser("bench_dense", ""), ["--config", arguments.config, *rest]
    )
    context = mp.get_context("spawn")
    sides = {}
    for name, make in (("ours", _ours), ("dense", _dense)):
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(make, config, arguments.threads, there), daemon=True
        )
        process.start()
        assert here.recv() == "ready"
        sides[name] = (here, [], process)
    peak = {}
    for number in range(arguments.steps + 1):
        for name, (pipe, seconds, _) in sides.items():
            pipe.send(number)
            taken, loss, peak[name] = pipe.recv()
            if number:
                seconds.append(taken)
            print(
                f"step {number}: {name} {taken:.3f} s, loss {loss:.4f}, peak "
                f"{peak[name] / 1e9:.2f} GB",
                flush=True,
            )
    for pipe, _, process in sides.values():
        pipe.send(None)
        process.join(timeout=30)
    users = config.data.batch_size
    ours, dense = (median(sides[name][1]) for name in ("ours", "dense"))
    ratios = [d / o for o, d in zip(sides["ours"][1], sides["dense"][1], strict=True)]
    print(
        f"median step: ours {ours:.3f} s ({users / ours:.0f} users/s), dense "
        f"{dense:.3f} s ({users / dense:.0f} users/s)"
    )
    print(
        f"ratio, step by step: median {median(ratios):.2f}; peak memory "
        f"{peak['ours'] / peak['dense']:.0%} of the dense one's"
    )


if __name__ == "__main__":
    main()
