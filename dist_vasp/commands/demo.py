"""A first run from data to lists, on a synthetic catalogue of songs, in about half a minute.

Draws users with planted tastes, shards their interactions, fits EASE and VASP on one rank, compares
both with popularity on the same test users, and writes lists and a report.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools import shard, synthesize
from data_tools.songs import titles
from dist_vasp.command_line import Parser
from dist_vasp.commands import evaluate, recommend, report, train
from dist_vasp.compare.statistics import PRIMARY, Scores, paired, read_scores
from dist_vasp.config.shipped import shipped_configs
from dist_vasp.data.manifest import users_file
from dist_vasp.files import parents
from dist_vasp.recommender import Recommender
from dist_vasp.signals import INTERRUPTED, EndedBySignal

SIZE = (3000, 800, 120_000)  # users, items, interactions
_SEED = 1
_LOG = "demo.log"
_OURS = {"interactions.parquet", "titles.parquet", "shards", "ease", "run", "lists.csv"}
_OURS |= {"lists.skipped.csv", "per-user", "report.html", "compare", "model", _LOG}
_SHOWN = 3  # users
_LONGEST = 40  # items of a shown history


def parser() -> Parser:
    parser = Parser(prog="dist-vasp demo", description=__doc__)
    parser.add_argument(
        "--output",
        default="demo",
        metavar="DIR",
        help="folder to write (default demo); that of an earlier demo is replaced",
    )
    parser.add_argument("--epochs", type=int, default=0, help="of VASP; default: demo.yaml's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    start = time.monotonic()
    demo = _Demo(Path(arguments.output), arguments.epochs)
    demo.make()
    seconds = time.monotonic() - start
    for line in [*_table(demo.scores()), "", *_users(demo), "", *_next(demo.folder, seconds)]:
        print(line)


@dataclass(frozen=True)
class _Demo:
    """The folder of a demo, and how it is made."""

    folder: Path
    epochs: int

    def make(self) -> None:
        """Make the folder anew. ValueError where it is not a demo's, or a step fails."""
        _clear(self.folder)
        with parents(self.folder / _LOG, "--output"):
            self.folder.mkdir(exist_ok=True)
        with open(self.folder / _LOG, "w", encoding="utf-8") as log, _stages() as say:
            for text, step in self._steps():
                say(text)
                _quietly(step, log)

    def _steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Yield what is told of each step, and the step."""
        at, shards = self._at, self._at("shards")
        config = ["--config", str(shipped_configs()["demo"]), "--data.shards", shards]
        ease = ["--model.kind", "ease", "--model.ease_lambda", "0"]
        vasp = ["--optimizer.schedule", f"[{{epochs: {self.epochs}, lr: 0.001}}]"]
        histories = ["--histories", at("interactions.parquet"), "--device", "cpu"]
        data = [at("interactions.parquet"), shards, "--titles", at("titles.parquet")]
        data += ["--val_users", str(SIZE[0] // 10), "--test_users", str(SIZE[0] // 5)]
        yield "drawing a catalogue of songs and its listeners", self._draw
        yield "sharding the interactions", partial(shard.main, data)
        yield "fitting EASE", partial(train.main, [*config, "--run.dir", at("ease"), *ease])
        more = vasp if self.epochs else []
        yield "training VASP", partial(train.main, [*config, "--run.dir", at("run"), *more])
        for name, source in self._sources().items():
            words = ["--shards", shards, "--device", "cpu", *source]
            words += ["--per_user", at(f"per-user/{name}.parquet")]
            yield f"evaluating {name}", partial(evaluate.main, words)
        out = ["--run", at("run"), "--k", "10", "--output", at("lists.csv")]
        yield "writing lists of all users", partial(recommend.main, [*out, *histories])
        runs = ["--run", at("run"), at("ease"), "--output", at("report.html")]
        yield "writing the report", partial(report.main, runs)

    def _draw(self) -> None:
        synthesize.synthesize(self.folder / "interactions.parquet", *SIZE, _SEED)
        named = titles(*SIZE, _SEED)
        table = pa.table({"item": list(named), "title": list(named.values())})
        pq.write_table(table, self.folder / "titles.parquet")
        (self.folder / "per-user").mkdir()

    def _sources(self) -> dict[str, list[str]]:
        """Return the options of evaluate for each model."""
        run, ease = ["--run", self._at("run")], ["--run", self._at("ease")]
        return {"popularity": ["--baseline", "popularity"], "EASE": ease, "VASP": run}

    def _at(self, name: str) -> str:
        return str(self.folder / name)

    def scores(self) -> list[Scores]:
        """Return the metrics of every test user, by model."""
        files = {name: self.folder / "per-user" / f"{name}.parquet" for name in self._sources()}
        return [read_scores(name, {0: file}) for name, file in files.items()]


def _clear(folder: Path) -> None:
    """Remove what an earlier demo has written."""
    if not folder.exists():
        return
    others = (
        {path.name for path in folder.iterdir()} - set(_OURS) if folder.is_dir() else {"itself"}
    )
    if not others and any(folder.iterdir()) and not (folder / _LOG).is_file():
        others = {path.name for path in folder.iterdir()}  # of an earlier version, or of a user
    if others:
        raise ValueError(
            f"--output {folder} holds something else than a demo ({', '.join(sorted(others)[:3])})"
            "; remove it, or choose another folder"
        )
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _LOG):  # the log last
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _quietly(step: Callable[[], Any], log: io.TextIOBase) -> None:
    """Run a step, whose words go to the log; an exit status other than 0 ends the demo."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = step()
    if status == INTERRUPTED:
        raise EndedBySignal(INTERRUPTED - 128)
    if isinstance(status, int) and status:
        raise ValueError(f"a step failed; {log.name} says why")  # type: ignore[attr-defined]


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Yield a function that tells of the present step: one line, overwritten on a terminal."""
    terminal = sys.stderr if sys.stderr.isatty() else None
    if terminal is None:
        print("drawing a catalogue, fitting EASE and VASP: about half a minute", flush=True)

    def say(text: str) -> None:
        if terminal is not None:
            terminal.write(f"\r{text + ' ...':<60}")
            terminal.flush()

    try:
        yield say
    finally:
        if terminal is not None:
            terminal.write(f"\r{'':<60}\r")
            terminal.flush()


def _table(models: list[Scores]) -> list[str]:
    """Return the table of metrics and the paired difference of the best model and the next."""
    n_users = models[0].estimate(PRIMARY).n
    lines = [f"{f'{n_users} test users':<16}{'NDCG@100':>18}{'Recall@20':>18}"]
    for model in models:
        cells = [model.estimate(column) for column in (PRIMARY, "recall@20")]
        told = "".join(f"{f'{cell.mean:.4f} +- {cell.se:.4f}':>18}" for cell in cells)
        lines.append(f"{model.name:<16}{told}")
    best, second = sorted(models, key=lambda model: -model.estimate(PRIMARY).mean)[:2]
    for other in (second, models[0]) if second is not models[0] else (second,):
        cells = [paired(best, other, column) for column in (PRIMARY, "recall@20")]
        told = "".join(f"{f'{cell.mean:+.4f} +- {cell.se:.4f}':>18}" for cell in cells)
        lines.append(f"{_less(best.name, other.name):<16}{told}")
    return [*lines, "+- one standard error; differences are paired, over the same users"]


def _less(name: str, other: str) -> str:
    return f"{name} - {'popular' if other == 'popularity' else other}"


def _users(demo: _Demo) -> list[str]:
    """Return the histories and lists of some test users in words."""
    model = Recommender.load(demo.folder / "run", verify=False)
    table = pq.read_table(demo.folder / "interactions.parquet")
    songs = pq.read_table(demo.folder / "titles.parquet")
    title_of = dict(zip(songs["item"].to_pylist(), songs["title"].to_pylist(), strict=True))
    lines, n_shown = [], 0
    ids = pq.read_table(demo.folder / "shards" / users_file("test"), columns=["id"])["id"]
    for user in ids.to_pylist():
        history = table.filter(pc.equal(table["user"], user))["item"].to_pylist()
        if len(history) > _LONGEST or n_shown == _SHOWN:
            continue
        n_shown += 1
        listed, _ = model.recommend([history], k=10)
        known, new = ([title_of[item] for item in items] for items in (history, listed[0]))
        lines += [f"user {user} likes {_genres(known)} songs, such as {_name(known[0])}"]
        lines += [f"  VASP lists {_genres(new)}: {'; '.join(map(_name, new[:2]))}"]
    return lines


def _name(title: str) -> str:
    """Return a title without its genre."""
    return title.rpartition(" (")[0]


def _genres(titles_: list[str]) -> str:
    """Return the commonest genres of some titles with their counts."""
    common = Counter(title.rpartition(" (")[2].rstrip(")") for title in titles_).most_common(3)
    return ", ".join(f"{n} {genre}" for genre, n in common)


def _next(folder: Path, seconds: float) -> list[str]:
    return [
        f"{folder}/report.html: metrics, curves and lists of both models; open it in a browser",
        f"{folder}/run is a trained model ({seconds:.0f} s in all). What to do next:",
        f"  dist-vasp explain --run {folder}/run --histories {folder}/interactions.parquet",
        "  dist-vasp shard YOUR.csv data/mine --user_column user --item_column item",
        "  dist-vasp train --config ml-1m --shards data/mine --run runs/mine",
    ]
