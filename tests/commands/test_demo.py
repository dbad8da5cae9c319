"""`dist-vasp demo`: what it prints, and the folder that it leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_tools.songs import titles
from dist_vasp import Recommender
from dist_vasp.commands import demo


@pytest.mark.slow  # .ci/run also runs `make demo`
def test_a_small_demo(call, capsys, tmp_path, monkeypatch):
    """The figures of the table are those of the models, and the folder can be used."""
    monkeypatch.setattr(demo, "SIZE", (150, 60, 3000))
    monkeypatch.chdir(tmp_path)
    folder = Path("demo")
    call(demo.main, "--output", folder, "--epochs", 1)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) <= 25 and err == "" and max(map(len, lines)) <= 130
    rows = {name: re.search(rf"^{name} +(\d\.\d+)", out, re.M) for name in ("EASE", "VASP")}
    logged = (folder / "demo.log").read_text()
    for name, run in (("EASE", "ease"), ("VASP", "run")):
        told = re.search(rf"/{run}, \S+ on test: NDCG@100 (\d\.\d+)", logged)
        assert rows[name] and told and rows[name][1] == told[1]
    assert "popularity " in out and re.search(r"^(EASE|VASP) - \w+ +[+-]0\.\d+ \+- ", out, re.M)
    assert out.count("  VASP lists ") == 3 and f"{folder}/report.html" in out
    model = Recommender.load(folder / "run")
    named = titles(150, 60, 3000, 1)
    assert all(model.title(item) == named[item] for item in model.items.ids.to_pylist())
    for name in ("interactions.parquet", "lists.csv", "report.html", "shards/manifest.json"):
        assert (folder / name).is_file()
    (folder / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"holds something else than a demo \(mine\.txt\)"):
        call(demo.main, "--output", folder)
    assert (folder / "run").is_dir()


def test_songs_are_named_once_and_by_the_seed_alone():
    named = titles(300, 400, 9000, 3)
    assert set(named) == set(range(1, 401)) and len(set(named.values())) == 400
    assert named == titles(300, 400, 9000, 3) != titles(300, 400, 9000, 4)
    genre_of_artist = {}
    for title in named.values():
        artist, genre = re.fullmatch(r".+ by (.+) \((\w+)\)", title).groups()
        assert genre_of_artist.setdefault(artist, genre) == genre
