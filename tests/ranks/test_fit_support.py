"""A long closed form on a support is resumed from its parts, on any number of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_vasp.commands import train as command
from dist_vasp.config.schema import Config, DataConfig, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model import closed_form_on_support, support
from dist_vasp.model.build import new_model
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.closed_form import fit as fit_closed_form
from dist_vasp.training.closed_form import parts as fit_parts
from dist_vasp.training.closed_form.parts import FOLDER, Parts
from dist_vasp.training.closed_form.support import SupportFit
from dist_vasp.training.stop import StoppedError
from tests.oracles.rounding import stored
from tests.ranks.test_closed_form import EVERY, I, users
from tests.ranks.test_ease import arguments, write_shards
from tests.support.jobs import RunFolder
from tests.support.make_shards import write_folder
from tests.support.ranks import rank_context, run_ranks

K = 6
NEVER = 10**9  # ticks


class Ticks:
    """A stop is requested on the last rank after `n` stretches."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def _fit(
    ranks: Ranks, shards: Path, folders: list[Path], stop_after: int
) -> tuple[np.ndarray, np.ndarray, dict[str, int]] | None:
    """Ids and weights of this rank, and for how many items each was computed; None where the fit
    was stopped. `folders`: the parts as each rank sees them; the last one is of all others."""
    fit_parts.SECONDS_BETWEEN_PARTS = 0.0
    closed_form_on_support.items_of_a_pass = lambda *sizes: 4
    computed = {"inputs": 0, "weights": 0}
    chosen, solve = support.supports_of, closed_form_on_support._solve

    def counted_choice(counts, start, stop, width):
        computed["inputs"] += stop - start
        return chosen(counts, start, stop, width)

    def counted_solution(systems, some, *more):
        computed["weights"] += len(systems.item_n[some])
        return solve(systems, some, *more)

    support.supports_of = counted_choice
    closed_form_on_support._solve = counted_solution
    keys = {f"ease_{name}": value for name, value in EVERY.items()}
    model = ModelConfig(kind="ease", neighbours=K, ease_user_exponent=-0.5, **keys)
    config = Config(model=model, data=DataConfig(shards=str(shards)))
    (path,) = new_model(config, I, ranks).matrices
    parts = folders[min(ranks.rank, len(folders) - 1)]
    stop = Ticks(stop_after)
    try:
        fit = SupportFit(config, Manifest.load(shards), ranks, stop, parts)
        fit.choose(path)
        fit.solve(path, model)
    except StoppedError:
        return None
    return path.ids[0].tensor.numpy(), path.weights[0].tensor.numpy(), computed


def fitted(
    n_ranks: int, shards: Path, *folders: Path, stop_after: int = NEVER, replicas: int = 1
) -> tuple[np.ndarray, np.ndarray, dict[str, int]] | None:
    """Ids and weights of all items, and the computed items of all ranks."""
    by_rank = run_ranks(_fit, n_ranks, shards, list(folders), stop_after, replicas=replicas)
    if by_rank[0] is None:
        return None
    n_partitions = n_ranks // replicas
    for rank in range(n_partitions, n_ranks):
        for found, expected in zip(by_rank[rank][:2], by_rank[rank % n_partitions], strict=False):
            np.testing.assert_array_equal(found, expected)
    ids, weights = (np.concatenate([rank[k] for rank in by_rank[:n_partitions]]) for k in range(2))
    computed = {name: sum(rank[2][name] for rank in by_rank) for name in ("inputs", "weights")}
    return ids, weights, computed


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    write_folder(path, users(), n_items=I)
    return path


@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory) -> dict[str, Path]:
    """Parts of two ranks that were stopped while they chose inputs, and while they solved."""
    path = tmp_path_factory.mktemp("stopped")
    folders = {"inputs": path / "inputs", "weights": path / "weights"}
    for what, stop_after in (("inputs", 15), ("weights", 230)):
        assert fitted(2, shards, folders[what], stop_after=stop_after) is None
        kinds = {file.name.partition("-")[0] for file in folders[what].iterdir()}
        assert kinds == {"inputs", what}
    return folders


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_a_stopped_fit_resumes_on_any_number_of_ranks(shards, stopped, tmp_path, n_ranks):
    whole = fitted(n_ranks, shards, tmp_path / "none")
    assert whole is not None and whole[2] == {"inputs": I, "weights": I}
    for what, folder in stopped.items():
        copy = Path(shutil.copytree(folder, tmp_path / what))
        resumed = fitted(n_ranks, shards, copy)
        assert resumed is not None
        np.testing.assert_array_equal(resumed[0], whole[0])
        if n_ranks == 2:
            np.testing.assert_array_equal(resumed[1], whole[1])
        stored(resumed[1], whole[1].astype(np.float64), f"weights resumed after {what}")
        if what == "inputs":
            assert 0 < resumed[2]["inputs"] < I and resumed[2]["weights"] == I
        else:  # three passes of both ranks are done
            assert resumed[2] == {"inputs": 0, "weights": I - 3 * 4 * 2}
        again = fitted(n_ranks, shards, copy)
        assert again is not None and again[2] == {"inputs": 0, "weights": 0}
        np.testing.assert_array_equal(again[1], resumed[1])


def test_damaged_parts_are_computed_again(shards, stopped, tmp_path):
    whole = fitted(2, shards, tmp_path / "none")
    copy = Path(shutil.copytree(stopped["weights"], tmp_path / "parts"))
    for kind in ("inputs", "weights"):
        first, second, *_ = sorted(copy.glob(f"{kind}-*"))
        first.write_bytes(first.read_bytes()[:-4])
        second.unlink()
    resumed = fitted(2, shards, copy)
    assert whole is not None and resumed is not None
    assert resumed[2]["inputs"] >= 2 and resumed[2]["weights"] == I - 3 * 4 * 2 + 2 * 4
    for found, expected in zip(resumed[:2], whole, strict=False):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_rank_that_does_not_see_the_parts_agrees(shards, stopped, tmp_path, replicas):
    """As on another host, where the newest files are not shown yet."""
    whole = fitted(2, shards, tmp_path / "none", replicas=replicas)
    copy = Path(shutil.copytree(stopped["weights"], tmp_path / "parts"))
    resumed = fitted(2, shards, copy, tmp_path / "empty", replicas=replicas)
    assert whole is not None and resumed is not None
    assert 0 < resumed[2]["inputs"] <= I
    np.testing.assert_array_equal(resumed[0], whole[0])
    stored(resumed[1], whole[1].astype(np.float64), "weights that one rank resumed")


# --- a run ----------------------------------------------------------------------------------------

MORE = (
    *("--model.neighbours", str(K), "--search.ease_lambda", "[40.0, 20.0]"),
    *("--model.ease_dtype", "fp32"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("fit_support") / "shards")


def _train(arguments: list[str], function: str, n: int) -> None:
    """A training whose parts are written as soon as there are any, and that SIGKILL ends when it
    calls a function the n-th time."""
    fit_parts.SECONDS_BETWEEN_PARTS = 0.0
    closed_form_on_support.items_of_a_pass = lambda *sizes: 9
    if function:
        owner, name = {
            "write": (Parts, "_write"),
            "validate": (fit_closed_form.ClosedFormFit, "_validate"),
            "end": (fit_closed_form, "remove_parts"),
        }[function]
        setattr(owner, name, _killing(getattr(owner, name), n))
    from launch.train import main

    raise SystemExit(main(arguments))


def _killing(function: Callable, n: int) -> Callable:
    called = 0

    def wrapped(*given):
        nonlocal called
        called += 1
        if called == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given)

    return wrapped


def train(*given: object, function: str = "", n: int = 0) -> int | None:
    """Train in a process of its own; return its status."""
    process = rank_context().Process(target=_train, args=(list(map(str, given)), function, n))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    assert train(*arguments(data, run.path, *MORE)) == 0
    assert not (run.path / FOLDER).exists()
    return run


@pytest.mark.parametrize(
    ("function", "n"),
    [("write", 30), ("write", 66), ("validate", 1), ("write", 70), ("end", 1)],
    ids=["choosing", "solving", "validating", "in the second setting", "at the end"],
)
def test_a_killed_run_resumes_to_the_bit(data, whole, tmp_path, function, n):
    run = RunFolder(tmp_path / "run")
    given = arguments(data, run.path, *MORE)
    assert train(*given, function=function, n=n) == -signal.SIGKILL
    left = {path.name for path in (run.path / FOLDER).glob("*.safetensors")}
    assert left
    assert train(*given) == 0
    assert not (run.path / FOLDER).exists()
    assert run.weights() == whole.weights()
    found, expected = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in one.lines()]
        for one in (run, whole)
    )
    assert found == expected


def test_what_a_stop_and_a_resume_say(data, tmp_path, call, capsys, monkeypatch):
    from launch.train import main

    monkeypatch.setattr(fit_parts, "SECONDS_BETWEEN_PARTS", 0.0)
    monkeypatch.setattr(closed_form_on_support, "items_of_a_pass", lambda *sizes: 9)
    given = arguments(data, tmp_path / "run", *MORE)

    class StopAfter(command.StopRequest):
        asked, last = 0, 0

        @property
        def requested(self) -> bool:
            type(self).asked += 1
            return type(self).asked > self.last

        @requested.setter
        def requested(self, value: bool) -> None: ...

    folder = tmp_path / "run" / FOLDER
    for last in (20, 110):
        StopAfter.asked, StopAfter.last = 0, last
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "StopRequest", StopAfter)
            assert call(main, *given) == 0
        out = capsys.readouterr().out
        assert (
            f"stopped on request; the same command resumes after the last part of {folder}" in out
        )
        assert call(main, *given, "--dry_run") == 0
        assert (
            "would resume from the parts in closed-form-parts that match" in capsys.readouterr().out
        )
    assert "resumed with the inputs of " in out
    calls = Parts.read
    read: list[float] = []

    def counted(self, own):
        is_done, seconds = calls(self, own)
        read.append(seconds)
        return is_done, seconds

    monkeypatch.setattr(Parts, "read", counted)
    assert call(main, *given) == 0
    out = capsys.readouterr().out
    assert "resumed with the inputs of " in out and "resumed with the weights of " in out
    assert re.search(r"lambda 40, systems: (\d+)/\1 parts", out)
    assert read[0] > 0 < read[1]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["seconds_training"] > read[0] + read[1], "what was resumed counts"
    assert not folder.exists()


def test_a_short_run_writes_no_parts(data, tmp_path, call, monkeypatch):
    from launch.train import main

    monkeypatch.setattr(Parts, "_write", None)
    call(main, *arguments(data, tmp_path / "run", *MORE))
    assert (tmp_path / "run" / "result.json").exists()
