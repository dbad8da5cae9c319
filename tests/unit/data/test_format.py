"""The shard format: round trips, and refusal of everything that is not it."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vasp.data.block import Block, concatenate, encode_block
from dist_vasp.data.hashing import keys_of_ids
from dist_vasp.data.items import load_items, read_items_file
from dist_vasp.data.manifest import ITEMS_FILE, MANIFEST, Manifest, default_users_per_shard
from dist_vasp.data.shard import iterate_shard
from tests.support.make_shards import make_block, write_folder

N_ITEMS = 12
ROWS = st.lists(st.sets(st.integers(0, N_ITEMS - 1), max_size=N_ITEMS).map(sorted), max_size=9)


def as_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def as_members(block: Block, key: str = "train-000000-000") -> dict[str, bytes]:
    return {
        f"{key}.{name}": data
        for name, data in encode_block(key, block).items()
        if name != "__key__"
    }


def npy(array: np.ndarray, **kwargs) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **kwargs)
    return buffer.getvalue()


@settings(max_examples=30, deadline=None)
@given(rows=ROWS, heldout=st.booleans(), cut=st.integers(0, 9))
def test_round_trip(rows, heldout, cut):
    split = "test" if heldout else "train"
    targets = rows[::-1] if heldout else None
    keys = np.arange(len(rows), dtype=np.uint64) * 2**60
    whole = make_block(keys, rows, targets)
    pieces = [
        make_block(keys[s], rows[s], targets[s] if targets is not None else None)
        for s in (slice(0, cut), slice(cut, None))
    ]
    data = as_tar(
        {k: v for i, piece in enumerate(pieces) for k, v in as_members(piece, f"x-{i}").items()}
    )
    found = concatenate(iterate_shard(data, split, N_ITEMS, "x.tar"))
    assert (found.held_out is None) == (whole.held_out is None) == (not heldout)
    pairs = [(found.user_keys, whole.user_keys)]
    for rows, expected_rows in ((found.rows, whole.rows), (found.held_out, whole.held_out)):
        if rows is not None:
            pairs += [(rows.indptr, expected_rows.indptr), (rows.items, expected_rows.items)]
    for array, expected in pairs:
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


BLOCK = make_block(np.arange(3, dtype=np.uint64), [[0, 3], [], [1, 2, 11]])


def damaged(**changes: np.ndarray) -> dict[str, bytes]:
    return {
        **as_members(BLOCK),
        **{f"train-000000-000.{name}.npy": npy(array) for name, array in changes.items()},
    }


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            damaged(items=np.array([0, 3, 1, 2, 12], np.int32)),
            "item rows go from 0 to 12, expected 0 to 11",
        ),
        (damaged(items=np.array([-1, 3, 1, 2, 11], np.int32)), "item rows go from -1"),
        (damaged(items=np.array([3, 0, 1, 2, 11], np.int32)), "not strictly ascending"),
        (damaged(items=np.array([0, 3, 1, 1, 11], np.int32)), "not strictly ascending"),
        (damaged(indptr=np.array([0, 2, 2, 4], np.int64)), "index pointer"),
        (damaged(indptr=np.array([0, 3, 2, 5], np.int64)), "index pointer"),
        (damaged(indptr=np.array([0, 2, 5], np.int64)), "index pointer"),
        (damaged(indptr=np.array([], np.int64)), "index pointer"),
        (damaged(items=np.array([0, 3, 1, 2, 11], np.int64)), "dtype int64"),
        (damaged(items=np.array([[0, 3, 1, 2, 11]], np.int32)), "shape"),
        (damaged(heldout_items=np.array([], np.int32)), "unexpected members"),
        (
            {**as_members(BLOCK), "train-000000-000.pickle": pickle.dumps(print)},
            "unexpected members .'pickle'",
        ),
        (
            {
                **as_members(BLOCK),
                "train-000000-000.items.npy": npy(np.array([{}], object), allow_pickle=True),
            },
            "items.npy",
        ),
        ({**as_members(BLOCK), "train-000000-000.items.npy": b"junk"}, "not a readable npy array"),
        (
            {**as_members(BLOCK), "train-000000-000.items.npy": npy(np.array([0], np.int32))[:-1]},
            "fills them",
        ),
        ({"train-000000-000.items.npy": npy(np.array([], np.int32))}, "missing members"),
    ],
)
def test_refuses_what_is_no_block(members, message):
    with pytest.raises(ValueError, match=message) as error:
        list(iterate_shard(as_tar(members), "train", N_ITEMS, "x.tar"))
    assert "x.tar" in str(error.value)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_damage_is_a_value_error_or_a_legal_block(data):
    raw = bytearray(as_tar(as_members(BLOCK)))
    position = data.draw(st.integers(0, 4000))
    raw[position] ^= data.draw(st.integers(1, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    message = "x.tar"
    try:
        for block in iterate_shard(bytes(raw), "train", N_ITEMS, "x.tar"):
            block.check(N_ITEMS, "x.tar")
    except ValueError as error:
        message = str(error)
    assert "x.tar" in message


def test_refuses_links_holes_and_compression():
    link, sparse = tarfile.TarInfo("a.items.npy"), tarfile.TarInfo("a.items.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    sparse.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + (2**40).to_bytes(11, "big")  # a hole that reading would fill
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\x00 " % sum(header)
    for member in (link.tobuf(tarfile.USTAR_FORMAT), bytes(header)):
        with pytest.raises(ValueError, match=r"x\.tar: member 'a\.items\.npy' is not a plain file"):
            list(iterate_shard(member + bytes(1024), "train", N_ITEMS, "x.tar"))
    whole = gzip.compress(as_tar(as_members(BLOCK)), mtime=0)
    extra = (
        bytes(257 - 12) + b"ustar" + bytes(40)
    )  # gzip's extra field puts the magic where a tar has it
    posing = (
        whole[:3]
        + bytes([whole[3] | 4])
        + whole[4:10]
        + len(extra).to_bytes(2, "little")
        + extra
        + whole[10:]
    )
    assert gzip.decompress(posing) and posing[257:262] == b"ustar"
    with pytest.raises(ValueError, match=r"x\.tar: "):
        list(iterate_shard(posing, "train", N_ITEMS, "x.tar"))


def test_refuses_items_that_the_manifest_does_not_vouch_for(tmp_path):
    manifest = write_folder(tmp_path, [[0, 1], [2]], n_items=N_ITEMS)
    path = tmp_path / ITEMS_FILE
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "popularity", pa.array([0] * N_ITEMS)), path)
    with pytest.raises(ValueError, match=r"items\.parquet has SHA-256 .* damaged or replaced"):
        load_items(tmp_path, manifest)
    with pytest.raises(
        ValueError, match=rf"lists {N_ITEMS} items of another vocabulary, expected {2**47} items"
    ):
        read_items_file(path, 2**47, manifest.vocabulary_sha256)
    pq.write_table(table.set_column(1, "id", pa.array(range(N_ITEMS))), path)
    with pytest.raises(ValueError, match=r"items\.parquet: the keys do not belong to the ids"):
        read_items_file(path, N_ITEMS, manifest.vocabulary_sha256)
    for column in (["x"] * N_ITEMS, [None] * N_ITEMS, [0.5] * N_ITEMS):
        pq.write_table(table.set_column(3, "popularity", pa.array(column)), path)
        with pytest.raises(ValueError, match=r"items\.parquet: column popularity is"):
            read_items_file(path, N_ITEMS, manifest.vocabulary_sha256)


def edited(folder, change):
    path = folder / MANIFEST
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version is 2, this version reads 1"),
        (lambda m: m.pop("n_items"), "the key 'n_items' is missing"),
        (lambda m: m.update(n_items=-1), "-1 is not a count"),
        (lambda m: m["splits"].pop("test"), "the key 'test' is missing"),
        (lambda m: m["splits"]["train"].update(users=5), "train.users is 5, its shards add up"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(name="../x.tar"),
            "is named '../x.tar'",
        ),
        (lambda m: m.update(n_items=2**48), "is not a count"),
        (lambda m: m["splits"].update(train=[]), "not a manifest of this project"),
    ],
)
def test_refuses_what_is_no_manifest(tmp_path, change, message):
    write_folder(tmp_path, [[0, 1], [2]], n_items=N_ITEMS)
    Manifest.load(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Manifest.load(tmp_path)


def test_manifest_round_trip(tmp_path):
    write_folder(tmp_path, [[0, 1], [2]], n_items=N_ITEMS)
    manifest = Manifest.load(tmp_path)
    (tmp_path / MANIFEST).write_text(manifest.to_json())
    assert Manifest.load(tmp_path) == manifest
    for text in ("", "{", "[]", "\udcff", '{"a":' * 100_000):
        (tmp_path / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="not a manifest of this project"):
            Manifest.load(tmp_path)


def test_keys():
    assert keys_of_ids(pa.array([0, 5, 2**63 - 1])).tolist() == [0, 5, 2**63 - 1]
    # written into every data folder with string ids, so they must never change
    assert keys_of_ids(pa.array(["a", "é"])).tolist() == [
        3405396810240292928,
        3394012004367669963,
    ]
    assert keys_of_ids(pa.array([], pa.string())).tolist() == []


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (64, 1), (65, 2), (4534, 71), (463_435, 4096)])
def test_default_users_per_shard(n, expected):
    assert default_users_per_shard(n) == expected
