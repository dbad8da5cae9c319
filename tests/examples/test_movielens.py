"""examples/movielens.ipynb runs from the first cell to the last, on a tiny MovieLens of planted
tastes, and holds nothing of the machine that wrote it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import PYTHONPATH, ROOT

NOTEBOOK = ROOT / "examples" / "movielens.ipynb"
PARAMETERS = """
from pathlib import Path
INPUT, WORK, EPOCHS, HELD_OUT = "ml-tiny.zip", Path("work"), 1, 10
SIZES = {"hidden": 32, "latent": 16}
FAVOURITES = ["Film 3 ", "Film 6 "]
"""


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def planted(path: Path) -> None:
    """A zip like ml-1m.zip: users like the films of their own third of the catalogue."""
    random = np.random.default_rng(0)
    ratings = []
    for user in range(1, 151):
        films = random.choice(30, size=12, replace=False) + 1
        ratings += [f"{user}::{f}::{5 if f % 3 == user % 3 else 4}::{user * 100}" for f in films]
    films = [f"{f}::Film {f} (2000)::Drama" for f in range(1, 31)]
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ml-tiny/ratings.dat", "\n".join(ratings) + "\n")
        file.writestr("ml-tiny/movies.dat", "\n".join(films) + "\n")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("pandas")
    planted(tmp_path / "ml-tiny.zip")
    code = [
        PARAMETERS if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])
        for cell in cells()
        if cell["cell_type"] == "code"
    ]
    (tmp_path / "notebook.py").write_text("\n\n".join([*code, "print(many.popular.tolist())"]))
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[False, False, True]"
    assert re.search(r"^Film \d+ \(2000\) p = 0\.\d+ = ", done.stdout, re.M)
    assert "<html" in (tmp_path / "work" / "report.html").read_text()[:500]


def test_nothing_of_a_machine_is_in_the_notebook():
    text = NOTEBOOK.read_text()
    assert not re.findall(r"/(?:home|root|tmp|work|usr|Users)/[^ \\\\\"]*", text)
    assert all(cell["cell_type"] in ("markdown", "code") for cell in cells())
    assert "Traceback" not in text and len(cells()) <= 30
