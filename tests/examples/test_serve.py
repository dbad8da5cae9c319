"""examples/serve.py: batches give the lists of single requests, and a reload drops no request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from dist_vasp import Recommender
from tests.support.paths import PYTHONPATH, ROOT
from tests.support.runs import write_run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from examples.load_test import histories, load
from examples.serve import Answer, Request, answers, make_app

IDS = [1000 + 3 * n for n in range(37)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Recommender:
    path = tmp_path_factory.mktemp("serve") / "run"
    write_run(path, IDS, "vasp")
    return Recommender.load(path)


def test_requests_of_a_batch_do_not_touch_each_other(model):
    requests = [
        Request(histories=[[1000, 1003], [1006]], k=3),
        Request(histories=[[1000]], k=5, filter_items=IDS[1:20]),
        Request(histories=[["x"]], k=2),  # ids of another kind than those of the others
        Request(histories=[[1000]], k=2, restrict_to=[5]),  # no known item: an error
        Request(histories=[[]], k=2, empty="popularity"),
        Request(histories=[[1009]], k=37, restrict_to=IDS[:4]),
    ]
    found = answers(model, requests)
    for request, answer in zip(requests, found, strict=True):
        if request.restrict_to == [5]:
            assert isinstance(answer, ValueError) and "leave no item" in str(answer)
            continue
        lists = model.recommend(
            request.histories,
            request.k,
            filter_items=request.filter_items,
            restrict_to=request.restrict_to,
            empty=request.empty,
        )
        assert isinstance(answer, Answer) and answer.model == model.model_sha256[:12]
        assert answer.items == [[i for i in row if i != -1] for row in lists.ids.tolist()]
        for scores, expected in zip(answer.scores, lists.scores, strict=True):
            np.testing.assert_allclose(scores, expected[~np.isnan(expected)], rtol=1e-5)
    assert found[4].items == [[1000, 1003]]
    assert set(found[5].items[0]) == {1000, 1003, 1006}


def test_the_application_answers(model):
    pytest.importorskip("httpx")
    from fastapi import testclient

    with testclient.TestClient(make_app(model, lambda: model)) as client:
        assert client.get("/health").json()["n_items"] == 37
        answer = client.post("/recommend", json={"histories": [[1000]], "k": 3})
        assert answer.json()["items"] == model.recommend([[1000]], 3).ids.tolist()
        wrong = client.post("/recommend", json={"histories": [[1.5]], "k": 3})
        assert wrong.status_code == 422


def _health(address: str) -> dict:
    with urllib.request.urlopen(f"http://{address}/health", timeout=10) as answer:
        return json.load(answer)


def _wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the server did not do so in time"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_reload_under_load_drops_no_request(tmp_path):
    """The parent's SIGHUP while four clients ask; a worker that dies is started again."""
    current, following = tmp_path / "model", tmp_path / "next"
    write_run(current, IDS, "vasp")
    write_run(following, IDS, "vasp", sharper=3.0)
    old, new = (Recommender.load(path).model_sha256[:12] for path in (current, following))
    server = _start(current)
    try:
        line = server.stdout.readline()
        address = line.split("http://")[1].split(",")[0]
        _wait_for(lambda: _answers(address))
        bodies = histories(str(current), 64, 5)
        shutil.move(current, tmp_path / "old")
        shutil.move(following, current)
        before = _health(address)["model"]
        second = _start(tmp_path / "old", address.rsplit(":")[1])
        assert second.wait(60) == 2, "the port is taken"
        os.kill(server.pid, signal.SIGHUP)
        clients = load(address, bodies, 4, 6.0)
        assert before == old
        assert [error for client in clients for error in client.errors] == []
        assert sum(len(client.seconds) for client in clients) > 50
        models = set().union(*(client.models for client in clients))
        assert new in models and models <= {old, new}
        _wait_for(lambda: {_health(address)["model"] for _ in range(8)} == {new})
        os.kill(_health(address)["process"], signal.SIGKILL)
        _wait_for(lambda: _answers(address))
    finally:
        server.terminate()
        assert server.wait(30) == 0


def _start(model: Path, port: str = "0") -> subprocess.Popen:
    command = [sys.executable, "examples/serve.py", str(model), "--processes", "2", "--port", port]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _answers(address: str) -> bool:
    try:
        return _health(address)["status"] == "ok"
    except OSError:
        return False
