"""Which files are read, how they are unpacked and decoded, and what is refused before memory is
spent."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import shard
from dist_vasp.data import ids
from dist_vasp.data.tables import csv_blocks, csv_header, csv_rows, parquet_file, streams
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import open_table

CSV = b"user,item,rating\n7,30,4\n2,x y,5\n"
ROWS = [("7", "30"), ("2", "x y")]


def pairs(
    *inputs, columns: Columns | None = None, kind: str | None = None, **reading
) -> list[tuple[str, str]]:
    """(user, item) of all rows, as texts."""
    table = open_table(list(inputs), columns, Reading(**reading), kind)
    found = []
    for batch in table.batches():
        found += zip(
            ids.as_text(batch["user"]).to_pylist(),
            ids.as_text(batch["item"]).to_pylist(),
            strict=True,
        )
    return found


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# --- packed, encoded, parted ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("twice", [False, True])
def test_compressions(tmp_path, suffix, twice):
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": pa.Codec("zstd").compress,
    }[suffix]
    data = bytes(pack(CSV[:30])) + bytes(pack(CSV[30:])) if twice else bytes(pack(CSV))
    path = tmp_path / f"a.csv{suffix}"
    path.write_bytes(bytes(data))
    assert pairs(path) == ROWS
    if suffix:
        path.write_bytes(data[:-5])
        with pytest.raises(ValueError, match="cannot be read"):
            pairs(path)
        path.write_bytes(b"no such thing at all, and longer than a header of any kind")
        with pytest.raises(ValueError, match=r"a\.csv.* cannot be read"):
            pairs(path)
        (tmp_path / "b.csv").write_bytes(data)
        with pytest.raises(
            ValueError,
            match=rf"b\.csv is {suffix.strip('.')[:2]}.* data; add \{suffix} to its name",
        ):
            pairs(tmp_path / "b.csv")


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252", "utf-16-le", "cp932"],
)
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_encodings(tmp_path, monkeypatch, encoding, block):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", block)
    text = (
        "user,item,name\n7,30,é\n2,x y,ü\n"
        if encoding != "cp932"
        else "user,item,name\n7,30,日\n2,x y,本\n"
    )
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding))
    assert pairs(path, encoding=encoding) == ROWS
    if encoding in ("latin-1", "cp1252", "cp932"):
        with pytest.raises(
            ValueError, match=r"a\.csv, row 2: the byte 0x.. is not UTF-8 text; .*--encoding"
        ):
            pairs(path)
    elif encoding == "utf-16-le":
        with pytest.raises(ValueError, match=r"a\.csv.* NUL byte.*--encoding utf-16-le"):
            pairs(path)
    else:
        assert pairs(path) == ROWS


def test_a_wrong_encoding_is_said(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("user,item\n7,é\n".encode("utf-16"))
    with pytest.raises(
        ValueError, match="begins with the mark of utf-16, but --encoding is cp1252"
    ):
        pairs(path, encoding="cp1252")
    path.write_bytes("user,item\n7,é\n".encode())
    with pytest.raises(ValueError, match=r"the bytes after \d+ are not ascii"):
        pairs(path, encoding="ascii")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("given", [False, True])
def test_delimiters(tmp_path, delimiter, given):
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.replace(b",", delimiter.encode()))
    assert pairs(path, delimiter=delimiter if given else None) == ROWS
    path.write_bytes(CSV.replace(b",", delimiter.encode()).split(b"\n", 1)[1])
    by_number = Columns("1", "2", "3")
    assert pairs(path, delimiter=delimiter, header=False, columns=by_number) == ROWS
    assert pairs(path, header=False) == ROWS


def test_headers(tmp_path):
    path = tmp_path / "a.csv"
    for header in (
        " user , item ,x",
        '"user","item","a ""b"""',
        "user_id:token,item_id:token,rating:float",
        "\n\nuser,item,x",
    ):
        path.write_text(f"{header}\n7,30,4\n2,x y,5\n")
        assert pairs(path) == ROWS, header
    path.write_text('user,item,"two\nlines"\n7,30,4\n2,x y,5\n')
    assert pairs(path) == ROWS
    path.write_text(
        "item,"
        + ",".join(f"column{i}" for i in range(20_000))
        + ",user\n30"
        + "," * 20_000
        + ",7\n"
    )
    assert pairs(path) == [("7", "30")]


# --- which files ----------------------------------------------------------------------------------


def test_hidden_and_other_files_are_skipped_and_said(tmp_path):
    for name in (
        "a.csv",
        "b/c.csv",
        ".ipynb_checkpoints/a-checkpoint.csv",
        "_temporary/0/a.csv",
        "._a.csv",
        "b/.hidden.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(CSV)
    (tmp_path / "README.txt").write_text("not a table")
    table = open_table([tmp_path])
    assert [Path(file.where).name for file in table.files] == ["a.csv", "c.csv"]
    assert sorted(Path(text.split(" (")[0]).name for text in table.skipped) == [
        "._a.csv", ".hidden.csv", ".ipynb_checkpoints", "README.txt", "_temporary",
    ]  # fmt: skip
    assert all(text in "\n".join(table.notes()) for text in table.skipped)


def test_several_inputs_and_globs(tmp_path):
    for n in range(3):
        (tmp_path / f"part-{n}.csv").write_text(f"user,item\n{n},{n}\n")
    assert pairs(tmp_path / "part-*.csv") == [("0", "0"), ("1", "1"), ("2", "2")]
    assert pairs(tmp_path / "part-2.csv", tmp_path / "part-0.csv") == [("2", "2"), ("0", "0")]
    table = open_table([tmp_path / "part-*.csv", tmp_path / "part-0.csv"])
    assert len(table.files) == 3 and "part-0.csv (named twice)" in table.skipped[0]
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "part-9.csv").write_text("user,item\n9,9\n")
    table = open_table([tmp_path / "**" / "part-*.csv"])
    assert len(table.files) == 3 and [Path(text).name for text in table.skipped] == [
        "part-9.csv (hidden)"
    ]
    (tmp_path / "part-3.csv").write_text("user,item,rating\n3,3,5\n")
    with pytest.raises(
        ValueError,
        match=r"part-3\.csv has the columns user, item, rating, the files before it user, item",
    ):
        pairs(tmp_path / "part-*.csv")


def test_a_link_to_a_folder_is_followed_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_bytes(CSV)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    assert pairs(tmp_path / "in") == ROWS


def test_hive_partitions_are_columns(tmp_path):
    for split, user in (("train", "7"), ("test", "a%2Fb"), ("train", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"split={split}" / f"user={user}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"item": [1, 2]}), folder / "part-0.parquet")
    table = open_table([tmp_path], Columns(split="split"))
    rows = [row for batch in table.batches() for row in batch.to_pylist()]
    assert [(str(r["user"]), r["item"], r["split"]) for r in rows] == [
        ("a/b", 1, "test"), ("a/b", 2, "test"), ("7", 1, "train"), ("7", 2, "train"),
    ]  # fmt: skip
    assert (table.rows, table.left_out) == (6, {"rows_without_user": 2})


@pytest.mark.parametrize(
    "log", ["_delta_log/0.json", ".hoodie/hoodie.properties", "metadata/v1.metadata.json"]
)
def test_tables_of_other_formats_are_refused(tmp_path, log):
    (tmp_path / "t" / log).parent.mkdir(parents=True)
    (tmp_path / "t" / log).write_text("{}")
    pq.write_table(pa.table({"user": [1], "item": [2]}), tmp_path / "t" / "part-0.parquet")
    for path in (
        tmp_path / "t",
        tmp_path / "t" / "part-0.parquet",
        tmp_path / "t" / "*.parquet",
        tmp_path,
    ):
        with pytest.raises(ValueError, match=r"belongs to an? .* table .*export its present rows"):
            pairs(path)


# --- zips -----------------------------------------------------------------------------------------


def test_members_of_a_zip(tmp_path):
    path = zipped(
        tmp_path / "a.zip",
        {"x/1.csv": CSV, "x/2.csv": CSV, "__MACOSX/x/._1.csv": b"\0", "x/about.txt": b"hello"},
    )
    assert pairs(path) == ROWS * 2
    assert pairs(f"{path}/x/2.csv") == ROWS
    assert pairs(f"{path}/x/*.csv") == ROWS * 2
    assert sorted(text.split(", ")[1] for text in open_table([path]).skipped) == [
        "__MACOSX/x/._1.csv (hidden)", "x/about.txt (no CSV by its name)",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"holds no CSV member 'y\.csv'; its members are"):
        pairs(f"{path}/y.csv")
    assert pairs(zipped(tmp_path / "b.zip", {"1.csv.gz": gzip.compress(CSV)})) == ROWS


def test_what_a_zip_claims_is_bounded(tmp_path, monkeypatch):
    path = zipped(tmp_path / "a.zip", {"a.csv": b"user,item\n" + b"1,2\n" * 100_000})
    monkeypatch.setattr(streams, "FREE_BYTES", 1000)
    monkeypatch.setattr(streams, "MAX_RATIO", 100)
    with pytest.raises(ValueError, match=r"a\.zip, a\.csv unpacks to more than 100 times its size"):
        pairs(path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, at + 12, 1 << 30)
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="says that its directory of members has 1,073,741,824 bytes"
    ):
        pairs(path)
    (tmp_path / "b.csv.zst").write_bytes(
        bytes(pa.Codec("zstd").compress(b"user,item\n" + b"1,2\n" * 1_000_000))
    )
    with pytest.raises(ValueError, match=r"b\.csv\.zst unpacks to more than 100 times"):
        pairs(tmp_path / "b.csv.zst")


def test_lines_and_headers_are_bounded(tmp_path, monkeypatch):
    for module in (csv_blocks, csv_header, csv_rows):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 100)
    path = tmp_path / "a.csv"
    for text, message in (
        (f"user,item\n1,2\n1,{'x' * 5000}\n", "row 3: a line of more than 1,000 bytes"),
        (
            f'user,item\n1,2\n1,"{chr(10).join("y" * 50 for _ in range(99))}"\n',
            "row 3: the quote that opens here does not close within 1,000",
        ),
        ("x" * 5000, "row 1: a line of more than 1,000 bytes"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            pairs(path)
    monkeypatch.setattr(csv_header, "MAX_COLUMNS", 10)
    path.write_text("user,item" + ",x" * 20 + "\n")
    with pytest.raises(ValueError, match="the first row has more than 10 cells"):
        pairs(path)


def test_texts_of_a_parquet_file_are_bounded(tmp_path, monkeypatch):
    """A long text that repeats is refused by its length in the dictionary, without a copy for every
    row."""
    path = tmp_path / "a.parquet"
    repeated = pa.DictionaryArray.from_arrays(
        pa.array([0] * 2000, pa.int32()), pa.array(["x" * 3_000_000])
    )
    pq.write_table(pa.table({"user": repeated, "item": [1] * 2000}), path)
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match="row 1: the id has more than 4,096 bytes"):
        pairs(path)
    assert pa.total_allocated_bytes() - before < 100e6
    pq.write_table(
        pa.table({"user": ["y" * 100_000] * 100, "item": [1] * 100}),
        path,
        use_dictionary=False,
        compression="zstd",
    )
    with pytest.raises(
        ValueError, match=r"column 'user' has .* bytes for 100 values in row group 0"
    ):
        pairs(path)
    monkeypatch.setattr(parquet_file, "MAX_CHUNK_BYTES", 1000)
    pq.write_table(pa.table({"user": range(1000), "item": range(1000)}), path)
    with pytest.raises(ValueError, match=r"at most 1,000 bytes .* write smaller row groups"):
        pairs(path)


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", None])
def test_encodings_of_a_parquet_file(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(parquet_file, "DELTA_ROWS_PER_BATCH", 7)
    users = [f"user-{n // 3}" for n in range(100)]
    options = {"use_dictionary": False, "column_encoding": {"user": encoding}} if encoding else {}
    pq.write_table(
        pa.table({"user": users, "item": range(100)}),
        tmp_path / "a.parquet",
        row_group_size=40,
        **options,
    )
    assert pairs(tmp_path / "a.parquet") == [(user, str(n)) for n, user in enumerate(users)]


@pytest.mark.parametrize(
    ("data", "what"),
    [(b'{"user": 1}\n', "is JSON"), (b"<!DOCTYPE html>", "an HTML page"), (b"PAR1", "a Parquet")],
)
def test_files_of_other_kinds_are_named(tmp_path, data, what):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.csv is .*{what.split()[-1]}"):
        pairs(tmp_path / "a.csv")


# --- the command ----------------------------------------------------------------------------------


def test_rows_read_are_those_used_and_left_out(tmp_path, capsys):
    rows = "".join(f"{u},{i},{i % 5 + 1}\n" for u in range(30) for i in range(u, u + 12))
    (tmp_path / "a.csv").write_text("user,item,rating\n" + rows + "NULL,3,5\n4,,5\n0,0,5\n")
    assert shard.main([str(tmp_path / "a.csv"), "--seed", "3", str(tmp_path / "o")]) == 0
    out = capsys.readouterr().out
    assert "read 363 rows" in out and "1 rows without user" in out and "1 rows without item" in out


def test_times_are_numbers(tmp_path):
    for text, expected in (
        ("5", 5.0),
        ("1970-01-02", 86_400e6),
        ("1970-01-01T00:00:01", 1e6),
        (" 2.5 ", 2.5),
    ):
        (tmp_path / "a.csv").write_text(f"user,item,when\n1,2,{text}\n")
        (batch,) = open_table([tmp_path / "a.csv"], Columns(time="when")).batches()
        assert batch["time"].to_pylist() == [expected], text
    for column in (
        pa.array([86_400], pa.timestamp("s")),
        pa.array([1], pa.date32()),
        pa.array([86_400 * 10**9], pa.timestamp("ns")),
    ):
        pq.write_table(pa.table({"user": [1], "item": [2], "when": column}), tmp_path / "a.parquet")
        (batch,) = open_table([tmp_path / "a.parquet"], Columns(time="when")).batches()
        assert batch["time"].to_pylist() == [86_400e6]


# --- what contradicts itself ----------------------------------------------------------------------


def test_a_column_of_a_file_and_its_folder_must_agree(tmp_path):
    folder = tmp_path / "user=7"
    folder.mkdir()
    (folder / "a.csv").write_text("user,item\n7,30\n7,40\n")
    pq.write_table(pa.table({"user": [7], "item": [50]}), folder / "b.parquet")
    assert pairs(folder / "a.csv", folder / "b.parquet") == [("7", "30"), ("7", "40"), ("7", "50")]
    (folder / "a.csv").write_text("user,item\n7,30\n07,40\n")
    with pytest.raises(
        ValueError, match="row 3: '07' where the name of the folder says '7'; move the row"
    ):
        pairs(folder / "a.csv")


def test_a_rating_of_a_file_and_its_folder_must_agree(tmp_path):
    folder = tmp_path / "rating=5"
    folder.mkdir()
    (folder / "a.csv").write_text("user,item,rating\n7,30,5.0\n")
    assert pairs(folder) == [("7", "30")]
    (folder / "a.csv").write_text("user,item,rating\n7,30,5\n7,31,4\n")
    with pytest.raises(ValueError, match="row 3: '4' where the name of the folder says '5'"):
        pairs(folder)


@pytest.mark.parametrize("first", ["user,item\n", "user,item,rating\n"])
def test_a_file_without_rows_has_columns_too(tmp_path, first):
    (tmp_path / "a.csv").write_text(first)
    (tmp_path / "b.csv").write_text("user,item,rating\n7,30,4\n")
    if "rating" in first:
        assert pairs(tmp_path) == [("7", "30")]
        return
    with pytest.raises(
        ValueError,
        match=r"b\.csv has the columns user, item, rating, the files before it user, item;",
    ):
        pairs(tmp_path)


def test_one_column_is_not_two_things(tmp_path):
    (tmp_path / "a.csv").write_text("user,item\n7,30\n")
    for columns in (Columns("user", "user"), Columns(rating="item")):
        with pytest.raises(
            ValueError,
            match=r"a\.csv: column '.*' is named as .* and as .*; name another for one of them",
        ):
            pairs(tmp_path / "a.csv", columns=columns)


def test_a_folder_of_both_kinds_needs_a_format(tmp_path, capsys):
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "a.csv").write_bytes(CSV)
    pq.write_table(pa.table({"user": [7], "item": [50]}), folder / "b.parquet")
    assert shard.main([str(folder), str(tmp_path / "out")]) == 2
    assert "holds both CSV and Parquet files; pass --format" in capsys.readouterr().err
    assert pairs(folder, kind="csv") == ROWS


def test_a_stray_quote_between_numbers_is_found(tmp_path):
    (tmp_path / "a.csv").write_text('user,item\n1,"2\n1,3"\n1,4\n')
    with pytest.raises(
        ValueError, match="row 2: a quote opens here and the cell holds 1 lines that look like rows"
    ):
        pairs(tmp_path / "a.csv")


# --- what is no table, or none that is meant ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "a.csv",
            b"user\n7\n",
            "has no column 'item'; its first line is one cell, 'user'; pass the character",
        ),
        ("a.csv", b"7,30\n", "has no column 'user'; its first line, '7', '30', looks like data"),
        ("a.csv", "user,item\n7,30\n".encode("utf-16-be"), "NUL byte.* pass --encoding utf-16-be"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (
            "a.csv.gz",
            gzip.compress(CSV, mtime=0) + b"rest",
            "not compressed with gzip, or something follows the data",
        ),
        (
            "a.csv.gz",
            gzip.compress(CSV, mtime=0)[:-8] + b"wrongsum",
            "incorrect data check; the file is cut off or damaged",
        ),
        ("a.parquet", CSV, "cut off, damaged, or no Parquet file"),
        ("a.parquet", b"", "0 bytes; the file is cut off or damaged"),
    ],
)
def test_files_that_are_not_what_they_seem(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        pairs(tmp_path / name)


def test_an_empty_name_is_not_the_present_folder(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_bytes(CSV)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the input is an empty text"):
        pairs("")


def test_a_member_of_a_zip_may_have_any_name(tmp_path):
    path = zipped(tmp_path / "a.zip", {"b[1].csv": CSV, "b1.csv": b"user,item\n1,1\n"})
    assert pairs(path / "b[1].csv") == ROWS


@pytest.mark.parametrize("name", ["idna", "punycode", "unicode_escape", "raw_unicode_escape"])
def test_encodings_that_are_not_of_files(tmp_path, capsys, name):
    (tmp_path / "a.csv").write_bytes(CSV)
    assert shard.main([str(tmp_path / "a.csv"), str(tmp_path / "out"), "--encoding", name]) == 2
    assert f"--encoding '{name}' is not known" in capsys.readouterr().err


# --- ratings and times ----------------------------------------------------------------------------


@pytest.mark.parametrize("rating", ["inf", "-Infinity", "1e400"])
def test_ratings_are_finite(tmp_path, rating):
    (tmp_path / "a.csv").write_text(f"user,item,rating\n7,30,4\n7,31,{rating}\n")
    with pytest.raises(ValueError, match="row 3: the rating is not a finite number"):
        pairs(tmp_path / "a.csv")


def times(path: Path) -> list[float]:
    return [
        t
        for batch in open_table([path], Columns(time="time")).batches()
        for t in batch["time"].to_pylist()
    ]


@pytest.mark.parametrize(
    "texts",
    [
        ["2024-01-02T00:00:00Z", "2024-01-02T01:00:00+01:00", "2024-01-01 23:00:00-0100"],
        ["2024-01-02 00:00:00 UTC", "2024-01-02 00:00:00.000000999 UTC"],
        ["2024-01-02", "2024-01-02 00:00", " 2024-01-02 00:00:00.0000009"],
    ],
)
def test_dates_with_and_without_an_offset(tmp_path, texts):
    (tmp_path / "a.csv").write_text(
        "user,item,time\n" + "".join(f"1,{i},{text}\n" for i, text in enumerate(texts))
    )
    assert set(times(tmp_path / "a.csv")) == {1704153600e6}


@pytest.mark.parametrize(
    "texts", [["2024-01-02", "2024-01-02T00:00:00Z"], ["2024-01-02", "1704153600"], ["2024-13-01"]]
)
def test_dates_of_several_kinds_are_refused(tmp_path, texts):
    (tmp_path / "a.csv").write_text(
        "user,item,time\n" + "".join(f"1,{i},{text}\n" for i, text in enumerate(texts))
    )
    with pytest.raises(
        ValueError,
        match=r"holds a time that is no date .*; write all as 2026-01-31 12:00:00, all "
        r"with an offset",
    ):
        times(tmp_path / "a.csv")


@pytest.mark.parametrize("kind", [pa.time64("us"), pa.duration("s"), pa.list_(pa.int64())])
def test_times_that_are_none(tmp_path, kind):
    column = (
        pa.array([[1]], kind) if pa.types.is_list(kind) else pa.array([1], pa.int64()).cast(kind)
    )
    pq.write_table(pa.table({"user": [1], "item": [1], "time": column}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'time' of type .* holds no numbers"):
        times(tmp_path / "a.parquet")
