"""Check where an output may be written, before anything is.

An output never replaces an input of its command, a file of a run, a data folder, an export, an
ensemble or a checkpoint, or a file that the command did not write. Nothing is written through a
link, a pipe or a device.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from dist_vasp.recognise import recognised

# what a command reads: the option that names it, and the path
Inputs = Sequence[tuple[str, str | Path | None]]
RUN_FILES = (
    r"config\.yaml|environment\.json|metrics\..*|result\.json|items\.parquet|tracking\.json|\.lock|"
    r"trained-users\.parquet|diverged-step-\d+\.json|checkpoints|tensorboard|closed-form-parts"
)
_PARTS = r"trunk\.(safetensors|pt2)|items-\d{5}-of-\d{5}\.safetensors"
_FOLDERS = (  # what a folder is, names that show it, and a pattern of the names in it
    ("a training run", ("checkpoints", "metrics.jsonl"), RUN_FILES),
    ("a checkpoint", ("checkpoint.json",), rf"checkpoint\.json|{_PARTS}"),
    ("an export", ("export.json",), rf"export\.json|items\.parquet|MODEL_CARD\.md|{_PARTS}"),
    ("an ensemble", ("ensemble.json",), r"ensemble\.json|MODEL_CARD\.md"),
    (
        "a data folder",
        ("manifest.json",),
        r"manifest\.json|items\.parquet|users-\w+\.parquet|(train|validation|test)-\d+\.tar",
    ),
)
_DEPTH = 4  # folders above an output that are checked, as in RUN/checkpoints/best/file
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
    """Return the error for the user: the path, the system's error, and how to fix it.

    `remedy` replaces "choose another `option`".
    """
    remedy = remedy or f"choose another {option or 'place'}"
    if error.errno in _NO_SPACE and "free some space" not in remedy:
        remedy = f"free some space or {remedy}"
    if error.errno not in _NO_SPACE:
        remedy = remedy.removeprefix("free some space or ")
    return ValueError(
        f"{_named(path, option)} cannot be written ({error.strerror or error}); {remedy}"
    )


def path_error(error: Exception) -> str:
    """Return one line on an error about a path that cannot be used; "" for any other error."""
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
    """Return the path if a file may be written there; ValueError where it may not.

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
    status = _status(path, option, make_parents)
    _check_inputs(path, option, inputs)
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{what} is a folder; name a file")
        _check_regular(path, option, status)
    check_belongs_to_nothing(path, option)
    if status is not None:
        if overwrite is False:
            raise ValueError(
                f"{what} exists; pass --overwrite to replace it, or choose another name"
            )
        if status.st_size and ours is not None and not recognised(ours, path):
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
    """Return the path if a folder may be written there; ValueError where it may not.

    An existing folder needs `overwrite` (None: the command has no such option, and replaces no
    folder). It may hold only files that `files_of` lists; `files_of` raises ValueError for a folder
    of another kind.
    """
    path, what = Path(path), _named(path, option)
    if path.is_symlink() and path.is_dir():  # a link to a folder is that folder
        path = Path(os.path.realpath(path))
    status = _status(path, option, make_parents)
    if status is not None and not stat.S_ISDIR(status.st_mode):
        _check_regular(path, option, status)
        raise ValueError(f"{what} exists and is not a folder; name another output folder")
    if status is not None and overwrite is None:
        raise ValueError(f"{what} exists; name another folder, or remove it yourself")
    if status is not None and not overwrite:
        raise ValueError(
            f"{what} exists already; name another output folder, or pass --overwrite to replace it"
        )
    _check_inputs(path, option, inputs)
    check_belongs_to_nothing(path, option)
    if status is not None and files_of is not None:
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
    """ValueError unless a file of this project is absent or a regular file (no link)."""
    status = _status(path, "", True)
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{path} is a folder, expected a file; remove it")
        _check_regular(path, "", status)


def check_own_folder(path: Path) -> None:
    """ValueError unless a folder of this project is absent or a real folder (no link)."""
    status = _status(path, "", True)
    if status is not None and stat.S_ISLNK(status.st_mode):
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, and nothing is written through a link; put "
            "the folder itself there"
        )
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is not a folder; remove it")


def check_run_folder(folder: Path) -> None:
    """ValueError unless a training may write into `folder`.

    It must be new or belong to a run, and hold no links.
    """
    check_belongs_to_nothing(folder, "run.dir")
    if not folder.is_dir():
        return
    for kind, telling, _ in _FOLDERS[1:]:
        if any((folder / name).exists() for name in telling):
            raise ValueError(f"run.dir {folder} holds {kind}; a run needs a folder of its own")
    is_run = any(
        os.path.lexists(folder / name) for name in (".lock", "environment.json", *_FOLDERS[0][1])
    )
    for name in (
        "config.yaml",
        "environment.json",
        "items.parquet",
        "trained-users.parquet",
        "metrics.jsonl",
        "result.json",
        "tracking.json",
    ):
        check_writable_file(folder / name)
        if not is_run and (folder / name).exists():
            raise ValueError(
                f"run.dir {folder} holds a {name} that no training wrote, which would be "
                "replaced; a run needs a folder of its own"
            )
    for name in ("checkpoints", "tensorboard", "closed-form-parts"):
        check_own_folder(folder / name)


def _named(path: str | Path, option: str) -> str:
    return f"{option} {path}" if option else str(path)


def _status(path: Path, option: str, make_parents: bool) -> os.stat_result | None:
    """Return the status of `path` itself, None if absent; ValueError where no output can be."""
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


def _check_regular(path: Path, option: str, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise ValueError(
            f"{_named(path, option)} is a link to {os.readlink(path)}, and nothing is written "
            "through a link; "
            "name the place itself, or remove the link"
        )
    for is_kind, kind in _KINDS:
        if is_kind(status.st_mode):
            raise ValueError(
                f"{_named(path, option)} is {kind}, expected a regular file; choose another name"
            )


def _check_inputs(path: Path, option: str, inputs: Inputs) -> None:
    """ValueError where `path` is or holds an input, also under another name or through a link."""
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
    """ValueError where the name is reserved by a run, a data folder, an export or the like."""
    place = Path(os.path.realpath(path.parent)) / path.name
    for folder in place.parents[:_DEPTH]:
        first = place.relative_to(folder).parts[0]
        for kind, telling, names in _FOLDERS:
            if re.fullmatch(names, first) and any((folder / name).exists() for name in telling):
                raise ValueError(
                    f"{_named(path, option)} would be a file of {kind}, {folder}, which is never "
                    "replaced; choose another name"
                )
