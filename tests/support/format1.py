"""Run folders of checkpoint format 1, and what every command gives for them.

tests/fixtures/format1 holds one small run of each kind as the last version that wrote format 1 left
it: a step and a best checkpoint on 2 partitions, an export, and an ensemble of two exports.
expected.json beside each run is what `observe` gave in that version, and for `resumed` and `started
from it` what the version gave that changed noise and initial weights (dist_vasp/kernels/random.py);
it gave the old values with the old numbers. tests/commands/test_format1.py calls `observe` again
and compares.

To write the folder again, check that version out (commit 56770e0) with this file, and run `python
-m tests.support.format1` in the root of the repository. Later versions write another format.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dist_vasp.recommender import Recommender
from launch import ensemble, evaluate, export, recommend, train
from tests.support.make_shards import write_folder
from tests.support.paths import PYTHONPATH, ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "format1"
N_ITEMS, N_NEW_ITEMS, STEPS, K = 32, 34, 6, 10
DATA = "--data.shards shards --data.batch_size 16 --data.workers 0 --parallel.lanes 4 --device cpu"
SIZES = (
    "--model.hidden 4 --model.latent 3 --model.encoder_layers 2 --model.decoder_layers 1 "
    "--parallel.block_columns 6 --parallel.compile never --run.keep 1 "
    "--optimizer.schedule '[{epochs: 3, lr: 0.01}]'"
)
KINDS = {
    "vasp": f"--model.kind vasp {SIZES}",
    "flvae": f"--model.kind flvae --loss.kind multinomial {SIZES}",
    "nease": f"--model.kind nease --loss.kind cosine {SIZES}",
    "ease": "--model.kind ease --model.ease_dropout 0.2",
    "vasp_drawn": f"--model.kind vasp --optimizer.item_state lean {SIZES}",
}
DRAWN = "--model.init_from_ease closed_form --model.ease_lambda 40 --optimizer.nease_decay 0.5"
MEMBERS = ("vasp", "ease")


def observe(kind: str) -> dict[str, Any]:
    """Return what each command gives for the run `kind` of the current folder, a copy of FIXTURES.

    Scores and losses are floats, unrounded; ids are exact.
    """
    run = f"{kind}/run"
    found: dict[str, Any] = {
        "evaluate": _evaluate(run),
        "recommend": _recommend(run),
        "recommender": _recommender(run),
        "export": _recommender(f"{kind}/export"),
        "recommend from export": _recommend(f"{kind}/export"),
    }
    export.main(["--run", run, "--output", "exported", "--device", "cpu"])
    found["export again"] = _recommender("exported")
    shutil.rmtree("exported")
    more = f"{DATA} --run.max_steps {STEPS + 1}"
    _train(f"--config {run}/config.yaml {more} --run.dir {run}")
    found["resumed"] = _last_lines(run, kind)
    new = "--run.max_steps 1 --run.dir new"
    if kind == "ease":
        _train(f"{DATA} {KINDS['vasp']} {new} --model.init_from_ease {run}")
    else:
        _train(f"{DATA} {KINDS[kind]} {new} --data.shards more --init_from {run}")
    found["started from it"] = _last_lines("new", "vasp")
    shutil.rmtree("new")
    return found


def observe_ensemble() -> dict[str, Any]:
    """Return the lists of the ensemble of the current folder, a copy of FIXTURES."""
    return {"recommend": _recommend("ensemble"), "evaluate": _evaluate("ensemble")}


def _train(words: str) -> None:
    train.main(shlex.split(words))


def _evaluate(run: str) -> dict[str, Any]:
    words = ["--run", run, "--device", "cpu", "--json", "metrics.json", "--shards", "shards"]
    evaluate.main(words)
    metrics = json.loads(Path("metrics.json").read_text())
    os.remove("metrics.json")
    return metrics["test"]


def _recommend(run: str) -> list[list[Any]]:
    """[[user, rank, item, score], ...] of the histories file."""
    words = f"--run {run} --histories histories.csv --k {K} --output lists.jsonl --device cpu"
    recommend.main(words.split())
    lines = [json.loads(line) for line in Path("lists.jsonl").read_text().splitlines()]
    os.remove("lists.jsonl")
    Path("lists.skipped.csv").unlink(missing_ok=True)
    return [[line[name] for name in ("user", "rank", "item", "score")] for line in lines]


def _recommender(folder: str) -> list[list[Any]]:
    """[[ids, scores] of each history] as the Python interface gives them."""
    histories = [row for row in _histories() if row]
    lists = Recommender.load(folder).recommend(histories, K)
    pairs = zip(lists.ids, lists.scores, strict=True)
    return [[ids.tolist(), scores.tolist()] for ids, scores in pairs]


def _last_lines(run: str, kind: str) -> dict[str, Any]:
    """The last step's loss and norms of a run, and the metrics of its result.json."""
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    result = json.loads(Path(run, "result.json").read_text())
    found = {name: result[name] for name in ("validation", "test", "checkpoint")}
    if kind == "ease":
        return found | {"ease_lambda": result["ease_lambda"]}
    step = [line for line in lines if "loss" in line][-1]
    return found | {name: step[name] for name in ("step", "loss", "kl", "grad_norm")}


# --- data -----------------------------------------------------------------------------------------


def _rows(n: int, n_items: int, seed: int) -> list[list[int]]:
    """Histories of two tastes, so that there is something to learn from a few steps."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(n):
        popularity = 1 / (1 + (np.arange(n_items) * (7 if user % 2 else 11)) % n_items)
        size = int(random.integers(4, 13))
        chosen = random.choice(n_items, size, replace=False, p=popularity / popularity.sum())
        rows.append(sorted(chosen.tolist()))
    return rows


def _histories() -> list[list[int]]:
    """Original ids, in no order; one history is empty, and one has an unknown item."""
    rows = [[1000 + item for item in row][::-1] for row in _rows(6, N_ITEMS, 5)]
    return [*rows, [], [1003, 77]]


def write_new_shards(folder: Path) -> None:
    """Shards of a grown catalogue: the known items in another order, among new ones."""
    ids = np.random.default_rng(8).permutation(1000 + np.arange(N_NEW_ITEMS)).tolist()
    held_out = [(row[::2], row[1::2]) for row in _rows(12, N_NEW_ITEMS, 7)]
    rows = _rows(40, N_NEW_ITEMS, 6)
    write_folder(folder, rows, held_out[:6], held_out[6:], N_NEW_ITEMS, item_ids=ids)


def _write_data() -> None:
    held_out = [(row[::2], row[1::2]) for row in _rows(24, N_ITEMS, 3)]
    write_folder("shards", _rows(40, N_ITEMS, 2), held_out[:12], held_out[12:], N_ITEMS, 64, 64)
    lines = [f"{user},{item}\n" for user, row in enumerate(_histories()) for item in row]
    Path("histories.csv").write_text("user,item\n" + "".join(lines))


# --- making the fixtures --------------------------------------------------------------------------


def _make(kind: str) -> None:
    """Train a run on two ranks and export it; keep what a later version has to read."""
    start = DRAWN if kind == "vasp_drawn" else ""
    words = f"{DATA} {KINDS[kind]} {start} --run.dir {kind}/run --run.max_steps {STEPS}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(ROOT / "launch" / "train.py"), *shlex.split(words)]
    subprocess.run(command, env=environment, check=True)
    for name in ("tensorboard", "environment.json", ".lock"):
        path = Path(kind, "run", name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    export.main(["--run", f"{kind}/run", "--output", f"{kind}/export", "--device", "cpu"])


@contextlib.contextmanager
def copy_of_fixtures(folder: Path) -> Iterator[None]:
    """Work in a copy of FIXTURES, with the shards of the grown catalogue beside it."""
    shutil.copytree(FIXTURES, folder, symlinks=True)
    write_new_shards(folder / "more")
    with contextlib.chdir(folder):
        yield


def main() -> None:
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    with contextlib.chdir(FIXTURES):
        _write_data()
        for kind in KINDS:
            _make(kind)
        exports = [f"{kind}/export" for kind in MEMBERS]
        weights = ["--weights", "1", "0.5"]
        ensemble.main(["--members", *exports, *weights, "--output", "ensemble"])
    work = FIXTURES.with_name("format1-work")
    with copy_of_fixtures(work):
        expected = {kind: observe(kind) for kind in KINDS} | {"ensemble": observe_ensemble()}
    shutil.rmtree(work)
    for kind, found in expected.items():
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items()]
        (FIXTURES / kind / "expected.json").write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main()
