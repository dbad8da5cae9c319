"""A Recommender that was loaded before a fork answers in the children; files that are written over
are noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dist_vasp import Recommender
from tests.support.paths import PYTHONPATH
from tests.support.runs import write_run

IDS = list(range(1, 2001))

# The matrices are large enough for torch to use all of its threads.
CHILDREN = """
import multiprocessing as mp, sys, numpy as np, pyarrow as pa, torch
from dist_vasp import Recommender
torch.set_num_threads(int(sys.argv[3]))
r = Recommender.load(sys.argv[1])
histories = [[17, 256, 391], [5, 6, 7]] * 100
table = pa.table({"user": [1, 1, 2], "item": [17, 256, 391]})
def answer():
    ids, scores = r.recommend(histories, k=5)
    near, _ = r.similar_items(17, 3)
    listed, why = r.recommend(table, 3).ids, r.explain([17, 256], 5)
    return ids.tolist(), np.asarray(scores), near.tolist(), listed.tolist(), why.item
if sys.argv[2] == "used":
    answer()
context = mp.get_context("fork")
queue = context.Queue()
children = [context.Process(target=lambda: queue.put(answer()), daemon=True) for _ in range(3)]
for child in children:
    child.start()
found = [queue.get(timeout=60) for _ in children]
expected = answer()
for one in found:
    assert [a == b for i, (a, b) in enumerate(zip(one, expected)) if i != 1] == [True] * 4
    assert np.allclose(one[1], expected[1], rtol=1e-4)
print("answered")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks") / "run"
    write_run(folder, IDS, columns=256)
    return folder


@pytest.mark.parametrize(
    ("before", "threads"),
    [
        ("used", "2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("used", "1"), ("loaded", "1"), ("loaded", "2"))
        ),
    ],
)
def test_children_answer(run, before, threads):
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, str(run), before, threads],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "answered\n", done.stderr


@pytest.fixture
def export(run, tmp_path):
    Recommender.load(run).export(tmp_path / "model")
    return tmp_path / "model"


def test_a_replaced_export_goes_on_answering(export):
    r = Recommender.load(export)
    before = r.recommend([[17, 256]], 5)
    shutil.copytree(export, export.with_name("new"))
    for file in export.with_name("new").glob("*.safetensors"):
        file.write_bytes(b"something else")
    shutil.rmtree(export)
    export.with_name("new").rename(export)
    after = r.recommend([[17, 256]], 5)
    assert np.array_equal(before.ids, after.ids) and np.array_equal(before.scores, after.scores)


@pytest.mark.parametrize("name", ["trunk.safetensors", "items-00000-of-00001.safetensors"])
def test_an_export_that_is_written_over_is_noticed(export, name):
    r = Recommender.load(export)
    os.utime(export / name, ns=(0, (export / name).stat().st_mtime_ns + 1))
    for call in (
        lambda: r.recommend([[17]], 5),
        lambda: r.similar_items(17, 3),
        lambda: r.explain([17], 5),
        lambda: r.export(export.with_name("again")),
    ):
        with pytest.raises(
            ValueError, match=rf"{name} was changed while the model was in use; load it again"
        ):
            call()
    assert len(Recommender.load(export).recommend([[17]], 5).ids[0]) == 5
