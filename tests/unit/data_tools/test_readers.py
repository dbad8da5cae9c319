"""Every real format, small: what is read, in which order, and what is said of damaged input."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import netflix
from data_tools.readers import Columns, infer_format, open_source
from dist_vasp.data.tables import csv_blocks

ROWS = [(7, 30, 4.0), (7, 10, 3.5), (2, 30, 5.0), (2, 10, 1.0)]


def read(path: Path, name: str | None = None, columns: Columns | None = None):
    source = open_source(path, name, columns)
    rows = [
        row
        for batch in source.batches()
        for row in zip(*(c.to_pylist() for c in batch.columns), strict=True)
    ]
    return rows, source.titles()


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


# --- CSV ------------------------------------------------------------------------------------------

CSV = b"user,item,rating\n7,30,4\n7,10,3.5\n2,30,5\n2,10,1\n"


@pytest.mark.parametrize(
    "data",
    [
        CSV,
        CSV.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + CSV,
        CSV[:-1],
        CSV.replace(b"7,30", b'"7",30'),
    ],
)
def test_csv(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(data)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))
    assert read(tmp_path / "a.csv")[0] == ROWS
    assert read(tmp_path / "b.csv.gz")[0] == ROWS


def test_csv_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("when,who,what,stars,part\n1,7,30,4,train\n2,7,10,3,1\n")
    assert read(path, None, Columns("who", "what"))[0] == [(7, 30), (7, 10)]
    assert read(path, None, Columns("who", "what", "stars", "part"))[0] == [
        (7, 30, 4.0, "train"),
        (7, 10, 3.0, "1"),
    ]
    with pytest.raises(
        ValueError,
        match="has no column 'user'; its columns, separated by ',', are 'when', 'who', "
        "'what', 'stars', 'part'; pass --user_column",
    ):
        read(path)
    with pytest.raises(ValueError, match="has no column 'score'"):
        read(path, None, Columns("who", "what", "score"))
    path.write_text("user,item,item\n1,2,3\n")
    with pytest.raises(ValueError, match="more than one column 'item'"):
        read(path)


@pytest.mark.parametrize(
    "other", ["x", "-3", "1.5", str(2**63), "08", "0x17", " 8", "8 ", "+8", "1e3", "\u0668"]
)
@pytest.mark.parametrize("role", ["user", "item"])
def test_csv_ids_are_integers_only_where_every_one_is(tmp_path, other, role):
    rows = [("7", "30"), ("8", other)] if role == "item" else [("7", "30"), (other, "8")]
    path = tmp_path / "a.csv"
    path.write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in rows))
    expected = [(int(u), i) if role == "item" else (u, int(i)) for u, i in rows]
    assert read(path)[0] == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"user,item,rating\n1,2,5\n1,3,good\n", "column 'rating', row 3: 'good' is not a number"),
        (b"user,item,rating\n1,2,5\n1,3,\n", "row 3: the rating is missing"),
        (b"user,item,rating\n1,2,5\n1,3,nan\n", "row 3: the rating is missing"),
        (b"user,item,rating\n1,2,5\n1,3,1e999\n", "row 3: the rating is not a finite number"),
        (b"user,item\n1,2\n1\n", "row 3: 1 cells where the header has 2"),
        (b"user,item\n1,2\n1,2,3\n", "row 3: 3 cells where the header has 2"),
        (b"user,item\n1,2\n1,\x003\n", "row 3: there is a NUL byte"),
    ],
)
def test_bad_csv(tmp_path, data, message):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_row_numbers_count_over_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_blocks, "BLOCK_BYTES", 64)
    path = tmp_path / "a.csv"
    path.write_text("user,item,rating\n" + "1,2,5\n" * 500 + "1,2,bad\n")
    with pytest.raises(ValueError, match="row 502: 'bad' is not a number"):
        read(path)
    path.write_text("user,item,rating\n" + "1,2,5\n" * 500 + "1,2\n")
    with pytest.raises(ValueError, match="row 502: 2 cells where the header has 3"):
        read(path)


def test_csv_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"user,item\n1,2\n\xe9,2\n")
    with pytest.raises(
        ValueError, match=r"row 3: the byte 0xe9 is not UTF-8 text; .* --encoding cp1252"
    ):
        read(path)


@pytest.mark.parametrize("keep", [5, 60, -3])
def test_truncated_gzip(tmp_path, keep):
    path = tmp_path / "a.csv.gz"
    path.write_bytes(
        gzip.compress(b"user,item\n" + np.random.default_rng(0).bytes(400).hex().encode())[:keep]
    )
    with pytest.raises(ValueError, match="runcated"):
        read(path)
    path.write_bytes(b"this is no gzip file")
    with pytest.raises(ValueError, match=r"a\.csv\.gz cannot be read"):
        read(path)


def test_folder_of_csv(tmp_path):
    (tmp_path / "2.csv").write_bytes(CSV)
    (tmp_path / "1.csv").write_text("user,item,rating\n1,1,1\n")
    assert read(tmp_path)[0] == [(1, 1, 1.0), *ROWS]


# --- Parquet --------------------------------------------------------------------------------------


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8(), pa.uint64()])
def test_parquet_integers(tmp_path, kind):
    path = parquet(
        tmp_path / "a.parquet",
        rating=pa.array([4, 1], pa.int8()),
        item=pa.array([3, 2], kind),
        user=pa.array([7, 7], kind),
    )
    assert read(path)[0] == [(7, 3, 4.0), (7, 2, 1.0)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_strings(tmp_path, kind):
    path = parquet(
        tmp_path / "a.parquet", item=pa.array(["é", "2"]).cast(kind), user=pa.array([7, 8])
    )
    assert read(path)[0] == [(7, "é"), (8, "2")]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1, -5]), "column 'item', row 2: the id -5 is outside 0 to 2.63-1"),
        (pa.array([1, 2**63], pa.uint64()), f"column 'item', row 2: the id {2**63} is outside"),
        (pa.array([1.0, 2.5]), "row 2: the id 2.5 is not a whole number"),
        (pa.array([1.0, 2.0**53]), "row 2: the id .* is not a whole number from 0 to 2.53-1"),
        (
            pa.array([1.0, 2.0**24], pa.float32()),
            "row 2: the id .* is not a whole number from 0 to 2.24-1",
        ),
        (pa.array([b"a", b"\xff"]), "column 'item', row 2: the id is not UTF-8 text"),
        (pa.array(["a", "b" * 5000]), "row 2: the id has more than 4,096 bytes"),
        (pa.array([True, False]), "column 'item' is of type bool"),
    ],
)
def test_bad_parquet_ids(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        read(parquet(tmp_path / "a.parquet", user=pa.array([1, 1]), item=ids))


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 this is not one")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        read(path)
    with pytest.raises(ValueError, match=r"row 1: 'good' is not a number"):
        read(parquet(path, user=pa.array([1]), item=pa.array([1]), rating=pa.array(["good"])))
    with pytest.raises(ValueError, match="its columns are 'user', 'thing'"):
        read(parquet(path, user=pa.array([1]), thing=pa.array([1])))


def test_parquet_split_and_folder(tmp_path):
    parquet(tmp_path / "1.parquet", user=pa.array([1]), item=pa.array([2]), split=pa.array([0]))
    parquet(tmp_path / "2.parquet", user=pa.array([1]), item=pa.array([3]), split=pa.array([1]))
    assert read(tmp_path, None, Columns(split="split"))[0] == [(1, 2, "0"), (1, 3, "1")]
    parquet(tmp_path / "3.parquet", user=pa.array(["1"]), item=pa.array([3]), split=pa.array([1]))
    assert read(tmp_path, None, Columns(split="split"))[0][2] == (
        1,
        3,
        "1",
    )  # the text 1 is the number 1


# --- MovieLens ------------------------------------------------------------------------------------

ML_CSV = {
    "ratings.csv": b"userId,movieId,rating,timestamp\n"
    b"7,30,4.0,1\n7,10,3.5,2\n2,30,5.0,3\n2,10,1.0,4\n",
    "movies.csv": 'movieId,title,genres\n10,"Misérables, Les (1995)",Drama\n30,Heat '
    "(1995),Action\n".encode(),
}
ML_DAT = {
    "ratings.dat": b"7::30::4::1\n7::10::3.5::2\n2::30::5::3\n2::10::1::4\n",
    "movies.dat": "10::Misérables, Les (1995)::Drama\n30::Heat (1995)::Action\n".encode("latin-1"),
}
TITLES = {10: "Misérables, Les (1995)", 30: "Heat (1995)"}


@pytest.mark.parametrize("files", [ML_CSV, ML_DAT])
def test_movielens(tmp_path, files):
    folder = tmp_path / "ml"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    packed = zipped(
        tmp_path / "ml-20m.zip",
        {"ml-20m/README.txt": b"", **{f"ml-20m/{n}": d for n, d in files.items()}},
    )
    for path in (folder, folder / next(iter(files)), packed):
        assert infer_format(path) == "movielens"
        assert read(path) == (ROWS, TITLES)
        assert read(path, "movielens") == (ROWS, TITLES)


def test_movielens_without_titles(tmp_path):
    (tmp_path / "ratings.dat").write_bytes(ML_DAT["ratings.dat"])
    assert read(tmp_path / "ratings.dat") == (ROWS, None)
    with pytest.raises(ValueError, match="the movielens format has fixed columns"):
        read(tmp_path / "ratings.dat", "movielens", Columns("u"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("ratings.dat", b"7::30::4::1\n7::10::good::2\n", "row 2: 'good' is not a number"),
        ("ratings.dat", b"7::30::4::1\n7::10\n", "row 2: 2 cells where the header has 4"),
        ("ratings.csv", b"user,item\n1,2\n", "has no column 'userId'"),
    ],
)
def test_bad_movielens(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "movielens")


def test_bad_zips(tmp_path):
    with pytest.raises(ValueError, match=r"holds no ratings\.csv"):
        read(zipped(tmp_path / "a.zip", {"x/other.txt": b""}), "movielens")
    whole = zipped(
        tmp_path / "b.zip", {"ml/ratings.dat": ML_DAT["ratings.dat"] * 1000}
    ).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:-30])
    flipped = bytearray(whole)
    flipped[60] ^= 255
    (tmp_path / "flip.zip").write_bytes(flipped)
    for name in ("cut.zip", "flip.zip"):
        with pytest.raises(ValueError, match=f"{name}.* cannot be read"):
            read(tmp_path / name, "movielens")


# --- Netflix --------------------------------------------------------------------------------------

MV = {
    "mv_0000001.txt": b"1:\n7,4,2005-09-06\n2,3,2005-05-13\n",
    "mv_0000002.txt": b"2:\n7,1,2005-01-01\n",
    "mv_0000003.txt": b"3:\n",
}
NETFLIX_ROWS = [(7, 1, 4.0), (2, 1, 3.0), (7, 2, 1.0)]
NETFLIX_TITLES = {1: "Dinosaur Planet", 2: "Isle of Man, The é", 3: "C"}
TITLE_FILE = "1,2003,Dinosaur Planet\n2,2004,Isle of Man, The é\n3,NULL,C\n".encode("latin-1")


def netflix_inputs(base: Path):
    """The same ratings in every form they are passed on in."""
    combined = base / "combined"
    combined.mkdir()
    (combined / "combined_data_1.txt").write_bytes(MV["mv_0000001.txt"])
    (combined / "combined_data_2.txt").write_bytes(MV["mv_0000002.txt"] + MV["mv_0000003.txt"][:-1])
    (combined / "movie_titles.csv").write_bytes(TITLE_FILE)
    folder = base / "download" / "training_set"
    folder.mkdir(parents=True)
    for name, data in MV.items():
        (folder / name).write_bytes(data)
    (folder.parent / "movie_titles.txt").write_bytes(TITLE_FILE)
    inner = tarred({f"training_set/{n}": d for n, d in MV.items()})
    (base / "download" / "training_set.tar").write_bytes(inner)
    prize = base / "nf_prize_dataset.tar.gz"
    prize.write_bytes(
        tarred(
            {"download/movie_titles.txt": TITLE_FILE, "download/training_set.tar": inner}, "w:gz"
        )
    )
    archive = zipped(base / "archive.zip", {p.name: p.read_bytes() for p in combined.iterdir()})
    return [combined, folder, base / "download" / "training_set.tar", prize, archive]


@pytest.mark.parametrize("form", range(5))
def test_netflix(tmp_path, form):
    path = netflix_inputs(tmp_path)[form]
    assert infer_format(path) == "netflix"
    rows, titles = read(path)
    assert rows == NETFLIX_ROWS
    assert titles == NETFLIX_TITLES


def test_one_netflix_file(tmp_path):
    path = tmp_path / "combined_data_1.txt"
    path.write_bytes(b"".join(MV.values()).replace(b"\n", b"\r\n"))
    assert read(path) == (NETFLIX_ROWS, None)


@settings(max_examples=40, deadline=None)
@given(
    movies=st.lists(st.lists(st.integers(1, 2**40), max_size=6), min_size=1, max_size=12),
    block=st.integers(1, 60),
    newline=st.booleans(),
)
def test_netflix_blocks_may_end_anywhere(tmp_path_factory, movies, block, newline):
    path = tmp_path_factory.mktemp("netflix") / "combined_data_1.txt"
    text = "".join(
        f"{m}:\n" + "".join(f"{u},{1 + u % 5},2005-01-01\n" for u in users)
        for m, users in enumerate(movies, 1)
    )
    path.write_text(text if newline else text[:-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(netflix, "BLOCK_BYTES", block)
        rows, _ = read(path)
    assert rows == [(u, m, 1.0 + u % 5) for m, users in enumerate(movies, 1) for u in users]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"7,4,2005-09-06\n", "line 1: the rating '7,4,2005-09-06' comes before any 'MOVIE:' line"),
        (b"1:\n7,4,2005-09-06\n7;4\n", "line 3: '7;4' is neither 'MOVIE:' nor 'USER,RATING,DATE'"),
        (b"1:\n7,good,2005-09-06\n", "line 2: '7,good,2005-09-06' is neither"),
        (b"1:\n7,,2005-09-06\n", "line 2: '7,,2005-09-06' is neither"),
        (b"1:\n-7,4,2005-09-06\n", "line 2: '-7,4,2005-09-06' is neither"),
        (b"one:\n7,4,2005-09-06\n", "line 1: 'one:' is neither"),
        (b"-1:\n7,4,2005-09-06\n", "line 1: '-1:' is neither"),
        (b":\n7,4,2005-09-06\n", "line 1: ':' is neither"),
        (b"1:\n\n7,4,2005-09-06\n", "line 2: '' is neither"),
        (b"1:\n7,4,2005-09-06\n\xff\xfe\n", "line 3: '.*' is neither"),
        (b"", "holds no line"),
    ],
)
def test_bad_netflix(tmp_path, data, message):
    path = tmp_path / "combined_data_1.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert "combined_data_1.txt" in str(error.value)


def test_bad_netflix_tar(tmp_path):
    (tmp_path / "a").mkdir()
    whole = netflix_inputs(tmp_path / "a")[3].read_bytes()
    for name, data in (
        ("cut.tar.gz", whole[:-40]),
        ("no.tar.gz", b"this is no tar"),
        ("empty.tar.gz", tarred({}, "w:gz")),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name, "netflix")


def test_members_with_bad_names_write_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    evil = tmp_path / "in" / "evil.tar"
    evil.write_bytes(
        tarred(
            {
                "../../mv_0000001.txt": MV["mv_0000001.txt"],
                "/etc/mv_0000002.txt": MV["mv_0000002.txt"],
            }
        )
    )
    before = sorted(tmp_path.rglob("*"))
    assert read(evil)[0] == NETFLIX_ROWS
    assert sorted(tmp_path.rglob("*")) == before


# --- which format ---------------------------------------------------------------------------------


def test_formats_by_name(tmp_path):
    (tmp_path / "ratings.csv").write_text("user,item\n1,2\n")
    assert infer_format(tmp_path / "ratings.csv") == "csv"
    for name, expected in {
        "a.csv": "csv",
        "a.CSV.GZ": "csv",
        "a.parquet": "parquet",
        "mv_0000001.txt": "netflix",
    }.items():
        (tmp_path / name).touch()
        assert infer_format(tmp_path / name) == expected
    for name in ("a.xlsx", "a.zip.bak", "a"):
        (tmp_path / name).touch()
        with pytest.raises(
            ValueError,
            match=r"cannot tell the format of .*; pass --format, one of csv, parquet, "
            r"movielens, netflix",
        ):
            infer_format(tmp_path / name)
    with pytest.raises(ValueError, match=r"the input .* does not exist"):
        open_source(tmp_path / "missing.csv", None, Columns())
