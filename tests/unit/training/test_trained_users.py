"""Users that a run's weights have seen, and held-out users among them (`--init_from`)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import shard
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.manifest import Manifest, users_file
from dist_vasp.parallel.agree import AgreedError
from dist_vasp.training.trained_users import FILE, Users
from launch.train import main as train
from tests.support.shard_folders import random_rows, write_csv


def users(ids) -> Users:
    array = pa.array(ids)
    return Users(keys_of_ids(array), pa.types.is_integer(array.type))


@pytest.mark.parametrize("old", [[1, 5, 8], ["1", "5", "8"]])
@pytest.mark.parametrize("new", [[5, 8, 9, 10], ["5", "8", "9", "anna"]])
def test_ids_are_compared_as_text_where_one_side_is_text(old, new):
    assert users(new).n_in(users(old)) == 2
    both = users(new).and_(users(old))
    assert len(both.keys) == 5 and users(new).n_in(both) == 4 and users(old).n_in(both) == 3


# --- a run from a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[tuple]:
    return random_rows(120, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """Shards `old`, `again` of another seed, `like` the old ones with more users, and a run."""
    path = tmp_path_factory.mktemp("leak")
    write_csv(path / "old.csv", rows)
    write_csv(path / "new.csv", [*rows, *random_rows(170, 30, 3)])
    held_out = ["--val_users", "20", "--test_users", "30"]
    for name, more in {
        "old": [*held_out],
        "again": [*held_out, "--seed", "1"],
        "like": ["--like", str(path / "old")],
        "later": ["--protocol", "last"],
    }.items():
        source = "new.csv" if name == "like" else "old.csv"
        assert shard.main([str(path / source), str(path / name), *more]) == 0
    return path


@pytest.fixture(scope="module")
def old_run(folder):
    start(folder, "old", "run")
    return folder / "run"


def start(folder, shards: str, run: str, *more) -> None:
    arguments = ["--data.shards", folder / shards, "--run.dir", folder / run, "--device", "cpu"]
    arguments += ["--model.kind", "nease", "--data.batch_size", 64, "--parallel.lanes", 4]
    arguments += ["--optimizer.schedule", "[{epochs: 1, lr: 0.01}]", "--data.workers", 0]
    train([str(a) for a in [*arguments, *more]])


def ids_of(folder, split: str) -> set:
    return set(pq.read_table(folder / users_file(split))["id"].to_pylist())


def test_a_run_notes_its_users(folder, old_run):
    assert set(pq.read_table(old_run / FILE)["key"].to_pylist()) == ids_of(folder / "old", "train")


def test_held_out_users_that_were_trained_on_are_refused(folder, old_run, capsys):
    trained = ids_of(folder / "old", "train")
    counts = [len(ids_of(folder / "again", s) & trained) for s in ("validation", "test")]
    assert all(counts)
    with pytest.raises(AgreedError) as error:
        start(folder, "again", "refused", "--init_from", old_run)
    assert (
        f"its model was trained on {sum(counts)} of the 50 held-out users of {folder / 'again'} "
        f"({counts[0]} validation, {counts[1]} test), whose metrics would be too high"
    ) in str(error.value)
    assert not (folder / "refused").exists()

    start(folder, "again", "allowed", "--init_from", old_run, "--allow_leak")
    assert f"was trained on {sum(counts)} of the 50 held-out users" in capsys.readouterr().out
    seen = set(pq.read_table(folder / "allowed" / FILE)["key"].to_pylist())
    assert seen == trained | ids_of(folder / "again", "train")

    # The run from it has seen the users of both, and a resumed run keeps them.
    with pytest.raises(AgreedError, match=r"was trained on \d+ of the 50 held-out users of .*old"):
        start(folder, "old", "third", "--init_from", folder / "allowed")
    longer = ["--optimizer.schedule", "[{epochs: 2, lr: 0.01}]"]
    start(folder, "again", "allowed", *longer)
    assert set(pq.read_table(folder / "allowed" / FILE)["key"].to_pylist()) == seen


def test_like_does_not_leak(folder, old_run, capsys):
    start(folder, "like", "from-like", "--init_from", old_run)
    assert "held-out users" not in capsys.readouterr().out


def test_a_protocol_in_which_every_user_trains(folder, old_run, capsys):
    start(folder, "later", "from-later", "--init_from", old_run)
    told = capsys.readouterr().out
    assert "is not known, because in protocol last every user trains" in told


def test_a_run_of_an_earlier_version(folder, old_run, capsys):
    """Without the file its shards tell, if they are what it was trained on."""
    (old_run / FILE).rename(folder / "aside")
    try:
        with pytest.raises(AgreedError, match="was trained on"):
            start(folder, "again", "refused", "--init_from", old_run)
        (folder / "old").rename(folder / "gone")
        start(folder, "again", "unknown", "--init_from", old_run)
        assert "which users it was trained on is not known" in capsys.readouterr().out
    finally:
        if (folder / "gone").exists():
            (folder / "gone").rename(folder / "old")
        (folder / "aside").rename(old_run / FILE)


def test_a_damaged_file_is_named(folder, old_run):
    good = (old_run / FILE).read_bytes()
    (old_run / FILE).write_bytes(good[:40])
    try:
        with pytest.raises(AgreedError, match=f"{FILE} cannot be read as the users of a run"):
            start(folder, "again", "refused", "--init_from", old_run)
    finally:
        (old_run / FILE).write_bytes(good)


def test_a_data_folder_without_lists_of_users_still_trains(folder, tmp_path, capsys):
    source = folder / "old"
    for path in source.iterdir():
        if not path.name.startswith("users-"):
            (tmp_path / path.name).symlink_to(path)
    start(tmp_path, ".", "../without", "--run.dir", tmp_path.parent / "without")
    assert f"{FILE} is not written" in capsys.readouterr().out
    assert not (tmp_path.parent / "without" / FILE).exists()
    assert Manifest.load(tmp_path).n_items == len(np.unique([row[1] for row in random_rows(120)]))
