"""Send the lines of metrics.jsonl to Weights & Biases and MLflow (`run.wandb`, `run.mlflow`).

Each service has its own thread, so that a slow or broken network does not delay a step. A service
that fails is reported once and then ignored. If a service is too slow, lines are dropped and
counted. The libraries are optional, and imported only when they are used.

RUN_DIR/tracking.json stores the ids of the run at the services, so that a resumed run continues
there.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import queue
import secrets
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from dist_vasp.bounded_json import read_json
from dist_vasp.config.schema import Config
from dist_vasp.files import replace_text
from dist_vasp.text import one_line

_WAITING = 10_000  # lines that may wait for a slow service
_FINISH_S = 60.0  # for which the end of a run waits for a service
_IDS = "tracking.json"


class Service(Protocol):
    """A tracking service; its methods may raise any exception."""

    def start(self, known: str | None) -> str:
        """Resume the run with the id `known`, or start a run; return its id."""

    def log(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        """Send lines, each with its prefix: train, validation, test."""

    def finish(self, ok: bool) -> None: ...


class Wandb:
    """A run of the project `run.wandb`."""

    def __init__(self, project: str, folder: Path, config: Config) -> None:
        self._library = _import("wandb", "run.wandb", project)
        self._project = project
        self._folder = folder
        self._config = config

    def start(self, known: str | None) -> str:
        name = known or secrets.token_hex(8)
        self._run = self._library.init(
            project=self._project,
            id=name,
            resume="allow",
            name=self._folder.name,
            dir=str(self._folder),
            config=asdict(self._config),
        )
        # a resumed run may repeat steps, which the service's own counter does not allow
        self._run.define_metric("*", step_metric="step")
        return name

    def log(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        for prefix, line in lines:
            self._run.log({"step": line["step"], **numbers(prefix, line)})

    def finish(self, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class MLflow:
    """A run of the experiment dist_vasp at the tracking server (or folder) `run.mlflow`."""

    def __init__(self, uri: str, folder: Path, config: Config) -> None:
        self._library = _import("mlflow", "run.mlflow", uri)
        self._uri = uri
        self._folder = folder
        self._config = config

    def start(self, known: str | None) -> str:
        self._client = self._library.MlflowClient(tracking_uri=self._uri)
        if known:
            self._name = known
            self._client.update_run(known, status="RUNNING")
            return known
        experiment = self._client.get_experiment_by_name("dist_vasp")
        number = (
            experiment.experiment_id if experiment else self._client.create_experiment("dist_vasp")
        )
        self._name = self._client.create_run(number, run_name=self._folder.name).info.run_id
        for key, value in flat(self._config).items():
            self._client.log_param(self._name, key, str(value)[:500])
        return self._name

    def log(self, lines: list[tuple[str, dict[str, Any]]]) -> None:
        now = int(time.time() * 1000)
        metrics = [  # a name may not contain @
            self._library.entities.Metric(
                name.replace("@", "_at_"), float(value), now, line["step"]
            )
            for prefix, line in lines
            for name, value in numbers(prefix, line).items()
        ]
        for first in range(0, len(metrics), 1000):  # the most that a server accepts at once
            self._client.log_batch(self._name, metrics=metrics[first : first + 1000])

    def finish(self, ok: bool) -> None:
        self._client.set_terminated(self._name, status="FINISHED" if ok else "KILLED")


def numbers(prefix: str, line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics line as `prefix/NAME`, without step and epoch."""
    return {
        f"{prefix}/{k}": v
        for k, v in line.items()
        if isinstance(v, int | float) and k not in ("step", "epoch")
    }


def flat(config: Config) -> dict[str, bool | str | float]:
    """Return the configuration as `section.key: value`; a list is its text."""
    found = {}
    for section, keys in asdict(config).items():
        for key, value in keys.items() if isinstance(keys, dict) else [("", keys)]:
            plain = value if isinstance(value, bool | str | int | float) else str(value)
            found[f"{section}.{key}".rstrip(".")] = plain
    return found


def services(folder: Path, config: Config) -> dict[str, Service]:
    """Return the services that the configuration names, not started yet.

    ValueError where a library is missing.
    """
    result: dict[str, Service] = {}
    if config.run.wandb:
        result["wandb"] = Wandb(config.run.wandb, folder, config)
    if config.run.mlflow:
        result["mlflow"] = MLflow(config.run.mlflow, folder, config)
    return result


def _import(library: str, key: str, value: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"{key} is {value!r}, but the library {library} cannot be imported ({error}); pip "
            f"install {library}, or leave the key empty"
        ) from None


class Tracking:
    """All services of a run, on rank 0."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._threads = [
            _Sender(name, service, folder) for name, service in services(folder, config).items()
        ]

    def add(self, prefix: str, line: dict[str, Any]) -> None:
        """Queue a metrics line for the services; this neither waits nor raises."""
        for sender in self._threads:
            sender.add(prefix, line)

    def close(self, ok: bool) -> None:
        """Wait at most one minute until the services have sent everything.

        `ok`: the run is complete.
        """
        deadline = time.monotonic() + _FINISH_S
        for sender in self._threads:
            sender.close(ok, deadline)


class _Sender(threading.Thread):
    """The thread of one service, a daemon, so that a hanging network does not keep the process."""

    def __init__(self, name: str, service: Service, folder: Path) -> None:
        super().__init__(name=f"tracking-{name}", daemon=True)
        self._service_name = name
        self._service = service
        self._ids = folder / _IDS
        self._lines: queue.Queue[tuple[str, dict[str, Any]] | bool] = queue.Queue(_WAITING)
        self._failed = False
        self._left_out = 0  # lines
        self.start()

    def add(self, prefix: str, line: dict[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._lines.put_nowait((prefix, line))
        except queue.Full:
            if not self._left_out:
                _warn(
                    f"{self._service_name} takes the metrics more slowly than they come; some are "
                    "left out"
                )
            self._left_out += 1

    def close(self, ok: bool, deadline: float) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put(ok, timeout=max(0.0, deadline - time.monotonic()))
        self.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            _warn(
                f"{self._service_name} did not take the last metrics within {_FINISH_S:.0f} "
                "s; metrics.jsonl has them all"
            )

    def run(self) -> None:
        try:
            known = _read_ids(self._ids).get(self._service_name)
            name = self._service.start(known)
            with _ONE_WRITER:
                replace_text(
                    self._ids, json.dumps(_read_ids(self._ids) | {self._service_name: name}) + "\n"
                )
            ended: bool | None = None
            while ended is None:
                lines: list[tuple[str, dict[str, Any]]] = []
                waiting: list[tuple[str, dict[str, Any]] | bool] = [self._lines.get()]
                while not self._lines.empty():
                    waiting.append(self._lines.get())
                for one in waiting:
                    if isinstance(one, bool):
                        ended = one
                    else:
                        lines.append(one)
                self._service.log(lines)
            self._service.finish(ended)
        except BaseException as error:  # training continues after any error of a service
            self._failed = True
            _warn(
                f"{self._service_name} failed and gets no more metrics ({type(error).__name__}: "
                f"{error}); metrics.jsonl has them all"
            )
            while not self._lines.empty():
                self._lines.get()


_ONE_WRITER = threading.Lock()


def _read_ids(path: Path) -> dict[str, str]:
    try:
        ids = read_json(path)
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in ids.items() if isinstance(v, str)} if isinstance(ids, dict) else {}


def _warn(text: str) -> None:
    print(f"warning: {one_line(text)}", flush=True)
