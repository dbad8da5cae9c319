"""Where an output may be written: the rules that are checked before anything is.

An output never replaces an input of its command, a file that a run, a data folder, an export, an
ensemble or a checkpoint consists of, or a file that the command did not write. It never goes
through a link, a pipe or a device.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

Inputs = Sequence[
    tuple[str, str | Path | None]
]  # what a command reads: the option that names it, and the path
RUN_FILES = (
    r"config\.yaml|environment\.json|metrics\..*|result\.json|items\.parquet|tracking\.json|\.lock|"
    r"diverged-step-\d+\.json|checkpoints|tensorboard"
)
_PARTS = r"trunk\.(safetensors|pt2)|items-\d{5}-of-\d{5}\.safetensors"
_FOLDERS = (  # what a folder is, the names that tell, and the names of what belongs to it
    ("a training run", ("checkpoints", "metrics.jsonl"), RUN_FILES),
    ("a checkpoint", ("checkpoint.json",), rf"checkpoint\.json|{_PARTS}"),
    ("an export", ("export.json",), rf"export\.json|items\.parquet|{_PARTS}"),
    ("an ensemble", ("ensemble.json",), r"ensemble\.json"),
    (
        "a data folder",
        ("manifest.json",),
        r"manifest\.json|items\.parquet|users-\w+\.parquet|(train|validation|test)-\d+\.tar",
    ),
)
_DEPTH = 4  # folders above an output that are looked at: RUN/checkpoints/best/file is deep enough
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_THE_PATH = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def unwritable(error: OSError, path: str | Path, option: str = "", remedy: str = "") -> ValueError:
    """Return the error for a user: the path, what the system says, and what to do. `remedy` is said
    in place of "choose another `option`"."""
    remedy = remedy or f"choose another {option or 'place'}"
    if error.errno in _NO_SPACE and "free some space" not in remedy:
        remedy = f"free some space or {remedy}"
    if error.errno not in _NO_SPACE:
        remedy = remedy.removeprefix("free some space or ")
    return ValueError(
        f"{_named(path, option)} cannot be written ({error.strerror or error}); {remedy}"
    )


def path_error(error: Exception) -> str:
    """Return one line on an error about a path that cannot be used as it is; "" for any other
    error."""
    if (
        not isinstance(error, OSError)
        or error.errno not in _OF_THE_PATH
        or not isinstance(error.filename, str | bytes)
    ):
        return ""
    return (
        f"{os.fsdecode(error.filename):.300} cannot be used ({error.strerror}); correct that, or "
        "name another place"
    )


def check_file(
    path: str | Path,
    option: str = "",
    overwrite: bool | None = None,
    ours: Callable[[Path], bool] | None = None,
    inputs: Inputs = (),
    endings: Collection[str] = (),
    make_parents: bool = False,
) -> Path:
    """Return the path where a file may be written there; ValueError where it may not.

    An existing file needs `overwrite` (None: the command has no such option), and `ours` must
    recognise it as an earlier output of the command. An empty file may always be replaced.
    """
    path, what = Path(path), _named(path, option)
    if len(endings) == 1 and path.suffix not in endings:
        raise ValueError(f"{what} does not end in {''.join(endings)}; name such a file")
    if endings and path.suffix not in endings:
        raise ValueError(
            f"{what} ends in {path.suffix or 'nothing'}, expected one of {', '.join(endings)}"
        )
    found = _look(path, option, make_parents)
    _check_inputs(path, option, inputs)
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{what} is a folder; name a file")
        _check_regular(path, option, found)
    check_belongs_to_nothing(path, option)
    if found is not None:
        if overwrite is False:
            raise ValueError(
                f"{what} exists; pass --overwrite to replace it, or choose another name"
            )
        if found.st_size and ours is not None and not _recognised(ours, path):
            raise ValueError(
                f"{what} exists and was not written by this command; choose another name, or "
                "remove it yourself"
            )
    return path


def check_folder(
    path: str | Path,
    option: str = "",
    overwrite: bool | None = None,
    files_of: Callable[[Path], Collection[str]] | None = None,
    inputs: Inputs = (),
    make_parents: bool = False,
) -> Path:
    """Return the path where a folder may be written there; ValueError where it may not.

    An existing folder needs `overwrite` (None: the command has no such option, and replaces no
    folder). It is replaced only where it holds no other files than `files_of` lists, which is a
    ValueError for a folder of another kind.
    """
    path, what = Path(path), _named(path, option)
    if path.is_symlink() and path.is_dir():  # a link to a folder is that folder
        path = Path(os.path.realpath(path))
    found = _look(path, option, make_parents)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        _check_regular(path, option, found)
        raise ValueError(f"{what} exists and is not a folder; name another output folder")
    if found is not None and overwrite is None:
        raise ValueError(f"{what} exists; name another folder, or remove it yourself")
    if found is not None and not overwrite:
        raise ValueError(
            f"{what} exists already; name another output folder, or pass --overwrite to replace it"
        )
    _check_inputs(path, option, inputs)
    check_belongs_to_nothing(path, option)
    if found is not None and files_of is not None:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise unwritable(error, path, option) from None
        known = files_of(path) if entries else ()
        foreign = [
            e.name for e in entries if e.name not in known or not e.is_file(follow_symlinks=False)
        ]
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ValueError(
                f"{what} holds {foreign[0]!r}{more}, which this command did not write: "
                "--overwrite does not delete it; "
                "name another folder, or move it away"
            )
    return path


def check_writable_file(path: Path) -> None:
    """ValueError unless a file of ours in a folder of ours is absent or a regular file: nothing is
    written through a link."""
    found = _look(path, "", True)
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            raise ValueError(f"{path} is a folder, expected a file; remove it")
        _check_regular(path, "", found)


def check_own_folder(path: Path) -> None:
    """ValueError unless a folder inside a folder of ours is absent or a real folder, not a link to
    one elsewhere."""
    found = _look(path, "", True)
    if found is not None and stat.S_ISLNK(found.st_mode):
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through a link; put "
            "the folder itself there"
        )
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{path} is not a folder; remove it")


def check_run_folder(folder: Path) -> None:
    """ValueError unless a training may write into `folder`: it is new, or a run's, and nothing of
    it is a link."""
    check_belongs_to_nothing(folder, "run.dir")
    if not folder.is_dir():
        return
    for kind, telling, _ in _FOLDERS[1:]:
        if any((folder / name).exists() for name in telling):
            raise ValueError(f"run.dir {folder} holds {kind}; a run needs a folder of its own")
    began = any(
        os.path.lexists(folder / name) for name in (".lock", "environment.json", *_FOLDERS[0][1])
    )
    for name in (
        "config.yaml",
        "environment.json",
        "items.parquet",
        "metrics.jsonl",
        "result.json",
        "tracking.json",
    ):
        check_writable_file(folder / name)
        if not began and (folder / name).exists():
            raise ValueError(
                f"run.dir {folder} holds a {name} that no training wrote, which would be "
                "replaced; a run needs a folder of its own"
            )
    for name in ("checkpoints", "tensorboard"):
        check_own_folder(folder / name)


def is_json(fits: Callable[[Any], bool], largest: int = 1 << 26) -> Callable[[Path], bool]:
    """Return a recogniser of JSON files: `fits` is asked about the content; it may raise KeyError
    or TypeError."""

    def ours(path: Path) -> bool:
        if path.stat().st_size > largest:
            return False
        try:
            found = json.loads(path.read_bytes())
            return bool(found) and fits(found)
        except (KeyError, TypeError, AttributeError, RecursionError):
            return False

    return ours


def begins_with(*starts: bytes) -> Callable[[Path], bool]:
    """Return a recogniser of files that begin with one of `starts`."""

    def ours(path: Path) -> bool:
        with open(path, "rb") as handle:
            return handle.read(max(map(len, starts))).startswith(starts)

    return ours


def _recognised(ours: Callable[[Path], bool], path: Path) -> bool:
    try:
        return ours(path)
    except (OSError, ValueError):
        return False


def _named(path: str | Path, option: str) -> str:
    return f"{option} {path}" if option else str(path)


def _look(path: Path, option: str, make_parents: bool) -> os.stat_result | None:
    """What is at `path` itself, None for nothing; ValueError where nothing can be there."""
    if path.name in ("", ".."):
        raise ValueError(f"{_named(path, option)} is a folder; give its last part a name")
    try:
        if not make_parents and not path.parent.is_dir():
            if path.parent.exists():
                raise ValueError(
                    f"{_named(path, option)}: {path.parent} is not a folder; choose another place"
                )
            raise ValueError(
                f"{_named(path, option)}: the folder {path.parent} does not exist; create it first"
            )
        return path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unwritable(error, path, option) from None


def _check_regular(path: Path, option: str, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise ValueError(
            f"{_named(path, option)} is a link to {os.readlink(path)}, and nothing is written "
            "through a link; "
            "name the place itself, or remove the link"
        )
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise ValueError(
                f"{_named(path, option)} is {kind}, expected a regular file; choose another name"
            )


def _check_inputs(path: Path, option: str, inputs: Inputs) -> None:
    """ValueError where `path` is, or holds, an input: under another spelling, or as a link to it,
    too."""
    place = Path(os.path.realpath(path))
    for name, source in inputs:
        if source and Path(source).exists():
            real = Path(os.path.realpath(source))
            kind = "folder" if real.is_dir() else "file"
            if real == place or (path.exists() and path.samefile(source)):
                raise ValueError(
                    f"{_named(path, option)} is the {kind} of {name}, which would be lost; choose "
                    "another name"
                )
            if real in place.parents and path.is_file():
                raise ValueError(
                    f"{_named(path, option)} is a file of {name} {source}, which would be lost; "
                    "choose another name"
                )
            if place in real.parents and path.exists():
                raise ValueError(
                    f"{_named(path, option)} holds {source} of {name}, which would be lost; "
                    "choose another"
                )


def check_belongs_to_nothing(path: Path, option: str) -> None:
    """ValueError where the name is one that a run, a data folder, an export or the like keeps for
    itself."""
    place = Path(os.path.realpath(path.parent)) / path.name
    for folder in place.parents[:_DEPTH]:
        first = place.relative_to(folder).parts[0]
        for kind, telling, names in _FOLDERS:
            if re.fullmatch(names, first) and any((folder / name).exists() for name in telling):
                raise ValueError(
                    f"{_named(path, option)} would be a file of {kind}, {folder}, which is never "
                    "replaced; choose another name"
                )
