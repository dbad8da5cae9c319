"""Generated CSV files, right and wrong, and what Python's csv module says of them."""

from __future__ import annotations

import csv
import gzip
import io
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from dist_vasp.data.tables.columns import Columns, Reading

_PIECES = [
    "7",
    "0",
    "12",
    "007",
    "a",
    "B",
    "é",
    "ü",
    "x y",
    " ",
    "-",
    "1e3",
    "9223372036854775807",
    "NULL",
    "",
]
_RARE = [
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\r",
    "::",
    "\x1f",
    "日本",
    "😀",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x0b",
    "\x0c",
    "'",
    "#",
    "\\",
]
_NARROW = [
    piece
    for piece in _PIECES + _RARE
    if piece.encode("latin-1", "replace") == piece.encode("latin-1", "ignore") and piece != "\x85"
]


@dataclass(frozen=True)
class CsvFile:
    """A file, how it is to be read, and the size of the blocks."""

    path: Path
    data: bytes  # before it was packed
    encoding: str
    delimiter: str
    columns: Columns
    reading: Reading
    block: int
    damaged: bool
    expected: Expected = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "expected", _reference(self))


@dataclass(frozen=True)
class Expected:
    """Rows by the csv module, or the first row that is an error; `rows` (user, item, title)."""

    rows: list[tuple[str, str, str]]
    error_row: int | None


def generate(seed: int, folder: Path) -> CsvFile:
    """File number `seed`: the same one every time."""
    draw = random.Random(seed)
    encoding = draw.choice(
        ["utf-8"] * 5 + ["utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1252"]
    )
    quoting = draw.random() > 0.1
    delimiter = draw.choice([",", ",", ",", ";", "\t", "|"])
    end = draw.choice(["\n", "\n", "\r\n", "\r\n", "\r"])
    columns = ["user", "item", "title"] + ["other"] * draw.randrange(3)
    draw.shuffle(columns)
    padded = [f" {name}" if draw.random() < 0.1 else name for name in columns]
    numeric = draw.random() < 0.4
    pieces = _NARROW if encoding in ("latin-1", "cp1252") else _PIECES + _RARE

    def cell(name: str) -> str:
        if numeric and name in ("user", "item"):
            return str(draw.randrange(1000))
        text = "".join(draw.choice(pieces) for _ in range(draw.choice([1, 1, 1, 2, 3, 8])))
        return text if quoting else "".join(c for c in text if c not in f'"\r\n{delimiter}')

    buffer = io.StringIO()
    style = (
        draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
        if quoting
        else csv.QUOTE_NONE
    )
    writer = csv.writer(
        buffer,
        delimiter=delimiter,
        lineterminator=end,
        quoting=style,
        escapechar=None,
        quotechar='"',
    )
    if not quoting:
        writer = csv.writer(
            buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_NONE, quotechar=None
        )
    writer.writerow(padded)
    head = len(buffer.getvalue())
    for _ in range(draw.choice([0, 1, 3, 20, 60])):
        writer.writerow([cell(name) for name in columns])
        if draw.random() < 0.03:
            buffer.write(end)  # a blank line
    text = buffer.getvalue()
    if draw.random() < 0.3:
        text = text.rstrip("\r\n")
    damaged = draw.random() < 0.4 and len(text) > head
    if damaged:
        for _ in range(draw.choice([1, 1, 2, 3])):
            at = draw.randrange(head, len(text) + 1)
            damage = draw.choice(
                ['"', '"', '"', delimiter, end, "\0", f"a{delimiter}b{end}", '"\n', "x"]
            )
            text = text[:at] + damage + text[at + draw.choice([0, 0, 1]) :]
    data = text.encode(encoding)
    named = None if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding
    reading = Reading(
        delimiter if draw.random() < 0.5 else None, named, quoting=quoting, missing=()
    )
    path = _packed(
        folder / f"{seed}.csv", data, draw.choice(["", "", "", "", ".gz", ".zst", ".zip"])
    )
    return CsvFile(
        path,
        data,
        encoding,
        delimiter,
        Columns(title="title"),
        reading,
        draw.randrange(1, 120),
        damaged,
    )


def _packed(path: Path, data: bytes, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(data))
    elif suffix == ".zst":
        with pa.CompressedOutputStream(str(packed), "zstd") as out:
            out.write(data)
    elif suffix == ".zip":
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.name, data)
    else:
        packed.write_bytes(data)
    return packed


def _reference(file: CsvFile) -> Expected:
    """What csv.reader in strict mode reads; a row of another width and a NUL are errors too."""
    lines = io.TextIOWrapper(io.BytesIO(file.data), encoding=file.encoding, newline="")
    quoting = {} if file.reading.quoting else {"quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, delimiter=file.delimiter, strict=True, **quoting)
    header = [name.strip() for name in next(reader)]
    places = [header.index(name) for name in ("user", "item", "title")]
    rows: list[tuple[str, str, str]] = []
    number = 1
    try:
        for record in reader:
            number += 1
            if not record:
                continue
            if len(record) != len(header) or any("\0" in cell for cell in record):
                return Expected(rows, number)
            user, item, title = (record[i] for i in places)
            if user and item:
                rows.append((user, item, title))
    except csv.Error:
        return Expected(rows, number + 1)
    return Expected(rows, None)
