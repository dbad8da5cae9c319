"""Weights & Biases and MLflow as fakes: what they are told, and that nothing they do stops a
run."""

from __future__ import annotations

import json
import sys
import threading
import time
import types

import pytest

from dist_vasp.config.checks import check
from dist_vasp.config.schema import Config, RunConfig
from dist_vasp.training import tracking
from dist_vasp.training.tracking import Tracking, numbers, services


class FakeWandb(types.ModuleType):
    """Keeps what it is told, as one run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told, self.started, self.metrics, self.exit_code = [], {}, [], None

    def init(self, **arguments):
        self.started = arguments
        return self

    def define_metric(self, *names, **of):
        self.metrics.append((names, of))

    def log(self, line):
        self.told.append(line)

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeMLflow(types.ModuleType):
    """Library and client in one; experiment 7 does not exist before it is made."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = types.SimpleNamespace(Metric=lambda *values: values)
        self.parameters, self.told, self.status, self.uri, self.created = {}, [], None, None, []

    def MlflowClient(self, tracking_uri):  # noqa: N802
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "7"

    def create_run(self, experiment, run_name):
        self.created.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))

    def update_run(self, name, status):
        self.status = (name, status)

    def log_param(self, name, key, value):
        self.parameters[key] = value

    def log_batch(self, name, metrics):
        self.told += [(name, metric) for metric in metrics]

    def set_terminated(self, name, status):
        self.status = (name, status)


def _config(**run) -> Config:
    return Config(run=RunConfig(**run))


def _step(step: int) -> dict:
    return {"step": step, "epoch": 0, "loss": 2.0 / step, "split": "train"}


def test_numbers_of_a_line():
    assert numbers("train", _step(2)) == {"train/loss": 1.0}


def test_wandb_gets_every_line_and_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    ids = []
    for start in (1, 3):
        fake = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", fake)
        one = Tracking(tmp_path, _config(wandb="films"))
        one.add("train", _step(start))
        one.add("validation", {"step": start, "ndcg@100": 0.4})
        one.close(ok=start == 3)
        assert fake.told == [
            {"step": start, "train/loss": 2.0 / start},
            {"step": start, "validation/ndcg@100": 0.4},
        ]
        assert (
            fake.started["project"] == "films"
            and fake.started["config"]["data"]["batch_size"] == 1024
        )
        assert fake.started["id"] == json.loads((tmp_path / "tracking.json").read_text())["wandb"]
        assert fake.metrics == [(("*",), {"step_metric": "step"})]
        assert fake.exit_code == (0 if start == 3 else 1)
        ids.append(fake.started["id"])
    assert ids[0] == ids[1]


def test_mlflow_gets_metrics_without_an_at_sign_and_no_password(tmp_path, monkeypatch):
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with pytest.raises(ValueError, match=r"run\.mlflow is .*MLFLOW_TRACKING_PASSWORD") as refused:
        check(_config(mlflow="https://me:secret@host"))
    assert "secret" not in str(refused.value)
    config = check(_config(mlflow="https://host:80/x@y"))
    one = Tracking(tmp_path / "", config)
    one.add("validation", {"step": 4, "epoch": 0, "ndcg@100": 0.25})
    one.close(ok=True)
    assert fake.uri == "https://host:80/x@y" and fake.created == [("7", tmp_path.name)]
    assert [(run, metric[0], metric[1], metric[3]) for run, metric in fake.told] == [
        ("run-1", "validation/ndcg_at_100", 0.25, 4)
    ]
    assert fake.parameters["model.kind"] == "vasp" and fake.parameters["device"] == "auto"
    assert fake.status == ("run-1", "FINISHED")
    again = Tracking(tmp_path, config)
    again.close(ok=False)
    assert fake.status == ("run-1", "KILLED") and len(fake.created) == 1


def test_a_service_that_fails_is_named_once_and_training_goes_on(tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(
        fake, "log", lambda line: (_ for _ in ()).throw(ConnectionError("no route\nto host"))
    )
    other = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", other)
    one = Tracking(tmp_path, _config(wandb="films", mlflow="there"))
    for step in range(1, 200):
        one.add("train", _step(step))
        time.sleep(0.0005)
    one.close(ok=True)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "warning: wandb failed and gets no more metrics (ConnectionError: no "
        "route to host); metrics.jsonl has them all"
    ]
    assert len(other.told) == 199


def test_a_service_that_hangs_keeps_neither_the_steps_nor_the_end(tmp_path, monkeypatch, capsys):
    fake, never = FakeWandb(), threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(fake, "init", lambda **arguments: never.wait(30))
    monkeypatch.setattr(tracking, "_FINISH_S", 0.2)
    monkeypatch.setattr(tracking, "_WAITING", 5)
    one = Tracking(tmp_path, _config(wandb="films"))
    for step in range(1, 30):
        one.add("train", _step(step))
    one.close(ok=True)
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 2
        and "some are left out" in said[0]
        and "did not take the last metrics" in said[1]
    )
    never.set()


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_missing_library_is_named_before_training(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ValueError,
        match=rf"run\.{library} is 'x', but the library {library} cannot be imported "
        rf".*pip install {library}",
    ):
        services(tmp_path, _config(**{library: "x"}))


def test_nothing_is_imported_unless_asked(tmp_path):
    assert services(tmp_path, _config()) == {}
    assert "wandb" not in sys.modules and "mlflow" not in sys.modules
