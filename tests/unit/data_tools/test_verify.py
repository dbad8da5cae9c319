"""Every fault of a data folder is named, and a sound one passes."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_tools import shard, verify
from dist_vasp.data.block import Block, concatenate, encode_block
from dist_vasp.data.hashing import sha256_of
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.shard import iterate_shard
from tests.support.shard_folders import random_rows, write_csv


@pytest.fixture
def folder(tmp_path) -> Path:
    source = write_csv(tmp_path / "in.csv", random_rows())
    arguments = [
        str(source),
        str(tmp_path / "out"),
        "--val_users",
        "6",
        "--test_users",
        "7",
        "--users_per_shard",
        "20",
    ]
    assert shard.main(arguments) == 0
    return tmp_path / "out"


def named(capsys, folder: Path, *messages: str, exactly: bool = True) -> None:
    """verify exits 2 and names each of `messages`, one a line."""
    capsys.readouterr()
    assert verify.main([str(folder)]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert all(line.startswith("error: ") for line in lines)
    for message in messages:
        assert sum(message in line for line in lines) == 1, (message, lines)
    if exactly:
        assert len(lines) == len(messages), lines


def rewrite_shard(folder: Path, name: str, change) -> None:
    """Replace a shard by a changed one and tell the manifest, as a faulty writer would."""
    split = name.split("-")[0]
    manifest = Manifest.load(folder)
    entry = next(s for s in manifest.splits[split].shards if s.name == name)
    block: Block = change(
        concatenate(iterate_shard((folder / name).read_bytes(), split, manifest.n_items, name))
    )
    (folder / name).chmod(0o644)
    with open(folder / name, "wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        tar.write(encode_block(name.removesuffix(".tar") + "-000", block))
    data = (folder / name).read_bytes()
    new = replace(
        entry,
        users=block.n_users,
        interactions=len(block.rows.items),
        heldout=block.n_held_out,
        bytes=len(data),
        sha256=sha256_of(data),
    )
    part = manifest.splits[split]
    shards = [new if s.name == name else s for s in part.shards]
    totals = {
        key: sum(getattr(s, key) for s in shards) for key in ("users", "interactions", "heldout")
    }
    splits = {**manifest.splits, split: replace(part, shards=shards, **totals)}
    (folder / "manifest.json").write_text(replace(manifest, splits=splits).to_json())


def rewrite_parquet(folder: Path, name: str, change) -> None:
    """Replace a Parquet file by a changed one and tell the manifest."""
    pq.write_table(change(pq.read_table(folder / name)), folder / name)
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"][name] = sha256_of((folder / name).read_bytes())
    (folder / "manifest.json").write_text(json.dumps(raw))


def with_column(table: pa.Table, name: str, values) -> pa.Table:
    return table.set_column(
        table.column_names.index(name), name, pa.array(values, table[name].type)
    )


def test_a_sound_folder(folder, capsys):
    capsys.readouterr()
    assert verify.main([str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    assert "47 train, 6 validation, 7 test users" in captured.out


def test_a_sound_folder_of_the_given_protocol(tmp_path):
    rows = [(u, i, "test" if r > 4 else "train") for u, i, r in random_rows()]
    source = write_csv(tmp_path / "in.csv", rows, "user,item,split")
    assert shard.main([str(source), str(tmp_path / "out"), "--protocol", "given"]) == 0
    assert verify.main([str(tmp_path / "out")]) == 0


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 300, 700, -2000, -1])
def test_a_flipped_byte(folder, capsys, position):
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[position] ^= 1
    (folder / "train-000001.tar").write_bytes(data)
    named(capsys, folder, "train-000001.tar has")


def test_a_truncated_tar(folder, capsys):
    path = folder / "test-000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    named(capsys, folder, "test-000000.tar has 1000 bytes")


def test_a_message_is_one_printable_line(folder, capsys):
    (folder / "new\nline\x1b[31m").touch()
    named(capsys, folder, "new line\\x1b[31m: manifest.json does not list it")


def test_absurd_numbers_of_items(folder, capsys):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["n_items"] = 2**47
    (folder / "manifest.json").write_text(json.dumps(raw))
    named(capsys, folder, f"expected {2**47} items")


def test_a_member_that_does_not_belong(folder, capsys):
    path = folder / "train-000000.tar"
    with tarfile.open(path, "a") as tar:
        data = pickle.dumps({"a": 1})
        info = tarfile.TarInfo("train-000000-000.extra.pickle")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    named(capsys, folder, "train-000000.tar has")
    raw = json.loads(
        (folder / "manifest.json").read_text()
    )  # even where the manifest vouches for it
    raw["splits"]["train"]["shards"][0] |= {
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path.read_bytes()),
    }
    (folder / "manifest.json").write_text(json.dumps(raw))
    named(capsys, folder, "unexpected members ['extra.pickle']")


def test_every_fault_is_named(folder, capsys):
    (folder / "train-000000.tar").unlink()
    (folder / "test-000000.tar").write_bytes(b"")
    (folder / "users-train.parquet").unlink()
    (folder / "notes.txt").write_text("")
    (folder / "spill").mkdir()
    named(
        capsys,
        folder,
        "train-000000.tar cannot be read",
        "test-000000.tar has 0 bytes",
        "users-train.parquet: cannot be read (No such file",
        "users-train.parquet: cannot be read as the users of train",
        "notes.txt: manifest.json does not list it",
        "spill: manifest.json does not list it",
    )


def test_changed_parquet_files(folder, capsys):
    for name in ("items.parquet", "users-test.parquet"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    named(
        capsys, folder, "items.parquet: SHA-256 is", "users-test.parquet: SHA-256 is", exactly=False
    )


def test_no_folder_and_no_manifest(tmp_path, capsys):
    named(capsys, tmp_path / "missing", "is not a folder")
    named(capsys, tmp_path, "holds no manifest.json")
    (tmp_path / "manifest.json").write_text("{}")
    named(capsys, tmp_path, "the key 'format_version' is missing")


# --- faults of a writer ---------------------------------------------------------------------------


def with_items(block: Block, items: np.ndarray) -> Block:
    return replace(block, rows=replace(block.rows, items=items))


def test_fold_in_and_held_out_overlap(folder, capsys):
    rewrite_shard(
        folder,
        "test-000000.tar",
        lambda b: replace(b, held_out=b.rows),
    )
    named(capsys, folder, "fold-in and held-out items of 7 users (keys")


def test_items_not_ascending_and_out_of_range(folder, capsys):
    rewrite_shard(folder, "train-000000.tar", lambda b: with_items(b, b.rows.items[::-1].copy()))
    rewrite_shard(
        folder,
        "train-000001.tar",
        lambda b: with_items(b, np.append(b.rows.items[:-1], np.int32(30))),
    )
    named(capsys, folder, "a user's item rows are not strictly ascending", "expected 0 to 29")


def test_popularity_that_is_not_the_count(folder, capsys):
    def one_less(b: Block) -> Block:
        return replace(b, rows=b.rows.where(np.arange(len(b.rows.items)) < len(b.rows.items) - 1))

    rewrite_shard(folder, "train-000000.tar", one_less)
    named(capsys, folder, "popularity of 1 items differs from the train shards")


def test_order_of_items(folder, capsys):
    popularity = pq.read_table(folder / "items.parquet")["popularity"].to_pylist()
    rewrite_parquet(
        folder, "items.parquet", lambda t: with_column(t, "popularity", popularity[::-1])
    )
    named(capsys, folder, "items are not by descending popularity", "differs from the train shards")


def test_ids_and_keys(folder, capsys):
    ids = pq.read_table(folder / "users-train.parquet")["id"].to_pylist()
    rewrite_parquet(
        folder, "users-train.parquet", lambda t: with_column(t, "id", [ids[1], *ids[1:]])
    )
    named(
        capsys,
        folder,
        "some user id is listed more than once",
        "the key of 1 user ids does not belong to the id, first at row 0",
    )


def test_users_that_the_tables_do_not_list(folder, capsys):
    rewrite_parquet(folder, "users-train.parquet", lambda t: t.slice(0, t.num_rows - 1))
    rewrite_parquet(folder, "users-test.parquet", lambda t: t.take(list(range(t.num_rows))[::-1]))
    rewrite_parquet(
        folder,
        "users-validation.parquet",
        lambda t: with_column(with_column(t, "id", range(6)), "key", range(6)),
    )
    named(
        capsys,
        folder,
        "users-train.parquet: it lists 46 users, the train shards hold 47",
        "users-test.parquet: its users are those of the test shards, in another order",
        "users-validation.parquet: the validation shards hold 6 users (keys",
    )


def test_users_twice_and_in_two_splits(folder, capsys):
    manifest = Manifest.load(folder)
    key = next(
        iterate_shard((folder / "test-000000.tar").read_bytes(), "test", manifest.n_items, "x")
    ).user_keys[0]
    rewrite_shard(
        folder, "train-000000.tar", lambda b: replace(b, user_keys=np.append(b.user_keys[:-1], key))
    )
    rewrite_shard(
        folder,
        "train-000001.tar",
        lambda b: replace(b, user_keys=np.append(b.user_keys[:-1], b.user_keys[0])),
    )
    named(
        capsys,
        folder,
        "users-train.parquet: the train shards hold 1 user (key",
        "is in the train shards more than once",
        "train and test shards share 1 user (key",
    )


def test_manifest_that_lists_other_files(folder, capsys):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["files"]["../secret"] = raw["files"].pop("users-test.parquet")
    (folder / "manifest.json").write_text(json.dumps(raw))
    named(
        capsys,
        folder,
        "it lists no SHA-256 of users-test.parquet",
        "it lists '../secret', which is no file of this format",
        "users-test.parquet: manifest.json does not list it",
    )
