"""Find the files that an input names: a file, a folder, a glob, a zip or members of one.

Hidden files are skipped and reported. Names of folders of the form `key=value` (Hive partitions)
are columns of the files below them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from dist_vasp.data.tables.streams import open_file, open_member, open_zip, readable, unpacked_name

CSV_SUFFIXES = (".csv", ".tsv", ".tab", ".inter")
# files that are often no tables: read only where they are named, not as part of a folder
OTHER_CSV_SUFFIXES = (".dat", ".data", ".txt")
PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_FOREIGN = (
    ("_delta_log", "a Delta Lake table", "delta_scan"),
    (".hoodie", "a Hudi table", "hudi_scan"),
    ("metadata/*.metadata.json", "an Iceberg table", "iceberg_scan"),
)


@dataclass(frozen=True)
class File:
    """A file of a table."""

    where: str  # its name in messages
    kind: str  # csv or parquet
    path: Path
    open: Callable[[], Any]  # of a CSV: its unpacked bytes
    # columns that its folders give; None: missing
    partitions: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """The files that the inputs name."""

    files: list[File]
    skipped: list[str]  # files that are not read, with the reason


def kind_of(name: str) -> str | None:
    """Return csv or parquet by the name, None for other names."""
    name = name.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "csv" if unpacked_name(name).endswith(CSV_SUFFIXES + OTHER_CSV_SUFFIXES) else None


def tables_among(names: Sequence[str], kind: str | None) -> dict[str, str]:
    """Return the names of tables, with their kind."""
    kinds = {
        name: kind_of(name)
        for name in names
        if not unpacked_name(name.lower()).endswith(OTHER_CSV_SUFFIXES)
    }
    return {name: k for name, k in kinds.items() if k is not None and kind in (None, k)}


def is_hidden(name: str) -> bool:
    """Return whether a part of a path holds no data by convention; `_key=value` is a partition."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def find_files(inputs: Sequence[str | Path], kind: str | None = None) -> Selection:
    """Return the files of all inputs, in this order, those of a folder by name.

    ValueError where there is none to read.
    """
    files: list[File] = []
    skipped: list[str] = []
    for text in inputs:
        for path in expand(str(text), skipped):
            files += _files_of(path, kind, skipped)
    seen: set[tuple[str, str]] = set()
    unique = []
    for file in files:
        key = (os.path.realpath(file.path), file.where.removeprefix(str(file.path)))
        if key in seen:
            skipped.append(f"{file.where} (named twice)")
        else:
            unique.append(file)
        seen.add(key)
    return Selection(unique, skipped)


def expand(text: str, skipped: list[str] | None = None) -> list[Path]:
    """Return the paths that an input names, without hidden ones that a glob matches.

    ValueError where there is none, or the input is a remote address.
    """
    if not text:
        raise ValueError("the input is an empty text; name a file or folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        scheme = text.split(":")[0]
        raise ValueError(
            f"{text} is a remote address and only local files are read; copy it here first, or "
            f"mount the {scheme} store"
        )
    path = Path(text)
    if os.path.lexists(path) or _zip_above(path):
        return [path]
    matched = (
        [Path(p) for p in sorted(glob.glob(text, recursive=True))] if glob.has_magic(text) else []
    )
    # the number of parts before the first pattern
    fixed = next((n for n, part in enumerate(path.parts) if glob.has_magic(part)), 0)
    wants_hidden = is_hidden(path.parts[fixed])  # such as _part-*.csv
    visible = [
        p for p in matched if wants_hidden or not any(is_hidden(part) for part in p.parts[fixed:])
    ]
    if skipped is not None:
        skipped += [f"{p} (hidden)" for p in matched if p not in visible]
    if not visible:
        what = "matches no file" if glob.has_magic(text) else "does not exist"
        raise ValueError(f"the input {text} {what}; name a file or folder")
    return visible


def _files_of(path: Path, kind: str | None, skipped: list[str]) -> list[File]:
    archive = _zip_above(path)
    if archive is not None:
        return _members_of(archive, path.relative_to(archive).as_posix(), skipped)
    if path.is_dir():
        return _files_below(path, kind, skipped)
    check_file(path)
    if path.suffix.lower() == ".zip" and kind != "parquet":
        return _members_of(path, None, skipped)
    _refuse_table(path.parent, path)
    kind = kind or kind_of(path.name)
    if kind is None:
        raise ValueError(
            f"cannot tell the format of {path} from its name; pass --format csv or --format parquet"
        )
    return [_file(path, kind, path)]


def check_file(path: Path) -> None:
    """ValueError unless the path is a regular file."""
    if not path.is_file():
        missing = "does not exist; name a file or folder"
        special = "is a pipe or device, which cannot be read twice; write it to a file first"
        raise ValueError(f"the input {path} {special if path.exists() else missing}")


def _file(path: Path, kind: str, named: Path) -> File:
    return File(str(path), kind, path, partial(open_file, path), _partitions(named.parts[:-1]))


def _partitions(parts: Iterable[str]) -> dict[str, str | None]:
    pairs = (part.split("=", 1) for part in parts if "=" in part[1:])
    return {
        unquote(key): None if value in (_NO_PARTITION, "") else unquote(value)
        for key, value in pairs
    }


# --- folders --------------------------------------------------------------------------------------


def _files_below(folder: Path, kind: str | None, skipped: list[str]) -> list[File]:
    _refuse_table(folder, folder)
    paths = list(walk(folder, skipped))
    tables = tables_among([str(path) for path in paths], kind)
    skipped += [
        f"{path} (no {_named(kind)} file by its name)" for path in paths if str(path) not in tables
    ]
    if not tables:
        raise ValueError(
            f"the folder {folder} holds no {_named(kind)} file that is not hidden; name another"
        )
    one_kind(folder, tables)
    return [_file(path, tables[str(path)], path) for path in paths if str(path) in tables]


def one_kind(folder: Path, tables: dict[str, str]) -> None:
    """ValueError where a folder holds tables of both kinds."""
    if len(set(tables.values())) > 1:
        raise ValueError(
            f"the folder {folder} holds both CSV and Parquet files; pass --format csv or --format "
            "parquet"
        )


def _named(kind: str | None) -> str:
    return {"csv": "CSV", "parquet": "Parquet", None: "CSV or Parquet"}[kind]


def walk(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """Yield the regular files below a folder by name; add hidden and special ones to `skipped`.

    Links to folders are followed once.
    """
    visited: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if os.path.realpath(root) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        if any(is_hidden(n) or n == "metadata" for n in folders):
            _refuse_table(Path(root), folder)
        for name in sorted(n for n in folders if is_hidden(n)):
            skipped.append(f"{Path(root, name)}/ (hidden)")
        folders[:] = sorted(n for n in folders if not is_hidden(n))
        for path in (Path(root, name) for name in sorted(names)):
            if is_hidden(path.name):
                skipped.append(f"{path} (hidden)")
            elif path.is_file():
                yield path
            else:
                skipped.append(f"{path} (not a file)")


def _raise(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be read ({error.strerror}); change its permissions, or name "
        "another folder"
    )


def _refuse_table(folder: Path, named: Path) -> None:
    """ValueError where the folder belongs to a table whose files also hold deleted rows.

    Three folders above it are checked, too.
    """
    for place in (folder, *list(folder.resolve().parents)[:3]):
        for pattern, what, function in _FOREIGN:
            if any(True for _ in place.glob(pattern)):
                raise ValueError(
                    f"{named} belongs to {what} ({place / pattern}), whose files also hold rows "
                    "that were replaced or deleted; "
                    "export its present rows first, with DuckDB for example: COPY (FROM "
                    f"{function}('{place}')) TO 'rows.parquet'"
                )


def names_in(path: Path) -> list[str]:
    """Return the names of the files in a folder or zip that are not hidden."""
    if path.is_dir():
        return sorted(str(p.relative_to(path)) for p in walk(path, []))
    with open_zip(path) as archive:
        inside = sorted(n for n in archive.namelist() if not n.endswith("/"))
    return [n for n in inside if not any(is_hidden(part) for part in PurePosixPath(n).parts)]


# --- zips -----------------------------------------------------------------------------------------


def _zip_above(path: Path) -> Path | None:
    """Return the zip file in a path such as data.zip/ratings.csv, None for other paths."""
    above = (p for p in path.parents if p.suffix.lower() == ".zip")
    return next((p for p in above if p.is_file()), None)


def _members_of(path: Path, wanted: str | None, skipped: list[str]) -> list[File]:
    """Return the tables in a zip by name: all of them, or those that match `wanted`."""
    with readable(str(path)), open_zip(path) as archive:
        names = sorted(n for n in archive.namelist() if not n.endswith("/"))
    if len(set(names)) < len(names):
        raise ValueError(f"{path} holds two members of one name; pack it again")
    chosen = (
        [wanted] if wanted in names else [n for n in names if wanted is None or fnmatch(n, wanted)]
    )
    hidden = [n for n in chosen if any(is_hidden(part) for part in PurePosixPath(n).parts)]
    visible = [n for n in chosen if n not in set(hidden)]
    members = visible if wanted is not None else list(tables_among(visible, "csv"))
    skipped += [
        f"{path}, {n} ({'hidden' if n in hidden else 'no CSV by its name'})"
        for n in chosen
        if n not in set(members)
    ]
    if not members:
        about = f"no CSV member {wanted!r}" if wanted else "no CSV member that is not hidden"
        raise ValueError(
            f"{path} holds {about}; its members are "
            f"{', '.join(names[:5]) or 'none'}{' ...' if len(names) > 5 else ''}"
        )
    return [
        File(
            f"{path}, {n}",
            "csv",
            path,
            partial(open_member, path, n),
            _partitions(PurePosixPath(n).parts[:-1]),
        )
        for n in members
    ]
