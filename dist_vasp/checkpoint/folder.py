"""The folder of a run's checkpoints: find one, open one, remove those that no longer count.

Every start of a training is an attempt with a random id. A best checkpoint is identified by its
step and the attempt that wrote it. A step checkpoint names the best checkpoint of its past. When a
run resumes from a step checkpoint, every best checkpoint that no step checkpoint names is removed
(`settle`): it was written after that step, or by another attempt.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_vasp.checkpoint.header import BestCheckpoint, Header, ModelHeader
from dist_vasp.checkpoint.read import Checkpoint, GoneError, header_of, open_checkpoint
from dist_vasp.checkpoint.write import remove
from dist_vasp.files import rename_folder, replace_link
from dist_vasp.parallel.agree import agree, any_rank
from dist_vasp.parallel.comm import Ranks, all_gather_bytes

BEST = "best"
_OURS = re.compile(
    r"(step|best)-([0-9]{8,15})"
)  # a copy under another name is not ours: never read unasked, never removed
_TRIES = 20  # a link or a listing may be replaced while it is read
_PAUSE_S = 0.05
_PATH_BYTES = 8192

H = TypeVar("H", bound=ModelHeader)


def step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def best_path(folder: Path, step: int) -> Path:
    return folder / f"{BEST}-{step:08d}"


# --- reading --------------------------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """Return the step checkpoint with the highest step, None where there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def newest_step(folder: Path) -> int:
    """Return the step of the newest step checkpoint by its name; 0 where there is none."""
    path = newest(folder)
    return _number(path) if path else 0


def _steps(folder: Path) -> list[Path]:
    return sorted((p for p in _ours(folder, "step") if (p / Header.FILE).is_file()), key=_number)


def _ours(folder: Path, kind: str) -> list[Path]:
    return [p for p in folder.glob(f"{kind}-*") if _OURS.fullmatch(p.name)]


def _number(path: Path) -> int:
    return int(path.name.partition("-")[2])


def open_named(path: Path) -> Checkpoint[Header]:
    """Open a checkpoint; ValueError where its folder has been given the name of another step."""
    opened = open_checkpoint(path)
    if _OURS.fullmatch(path.name) and _number(path) != opened.step:
        opened.close()
        raise ValueError(
            f"{path} holds the checkpoint of step {opened.step}, not of step {_number(path)}; "
            "rename it back"
        )
    return opened


def find(folder: Path, name: str | None = None) -> Path:
    """Return the checkpoint `name`, else the best, else the newest; ValueError lists what there is.

    A link is followed here, once: what it points at later is another checkpoint. It never leads out
    of the folder.
    """
    path = _followed(folder / (BEST if name is None else name))
    if name is None and not path.exists():
        if path != _followed(folder / BEST):
            raise GoneError(
                f"{path} was replaced by another best checkpoint; start the same command again"
            )
        path = _best_without_link(folder) or path
    plain = name is None or Path(name).name == name.removesuffix("/") != ".."
    if not plain or not (path / Header.FILE).is_file():
        found = sorted(p.parent.name for p in folder.glob(f"[!.]*/{Header.FILE}"))
        if not found:
            raise ValueError(
                f"{folder.parent} holds no checkpoint; name the run.dir of a training run that "
                "has saved one"
            )
        what = path if plain else name
        text = f"{what} is not a checkpoint; {folder} holds {', '.join(found)}; name one of them"
        raise GoneError(text) if name in (None, BEST) else ValueError(text)
    if os.path.realpath(path.parent) != os.path.realpath(folder):
        raise ValueError(
            f"{folder / (name or BEST)} is a link to {path}, which is not a checkpoint of this "
            "run; remove the link, or name the other run"
        )
    return path


def _best_without_link(folder: Path) -> Path | None:
    """Return the best checkpoint of a copy that has lost the link: the one that the newest step
    checkpoint names, else that step checkpoint itself."""
    path = newest(folder)
    header = header_of(path) if path else None
    return (best_of(folder, header) if header else None) or path


def _followed(path: Path) -> Path:
    try:
        return path.parent / os.readlink(path)
    except OSError:  # no link
        return path


def open_found(folder: Path, name: str | None = None) -> Checkpoint[Header]:
    """Open the checkpoint `name`, else the best, else the newest; look again where it was replaced
    meanwhile."""
    return persist(lambda: open_named(find(folder, name)))


def persist(opening: Callable[[], Checkpoint[H]]) -> Checkpoint[H]:
    """Call `opening` until what it finds is still there when it is opened; GoneError after a second
    of failures."""
    for _ in range(_TRIES):
        try:
            return opening()
        except GoneError:
            time.sleep(_PAUSE_S)
    return opening()


def open_together(
    opening: Callable[[], Checkpoint[H] | None],
    reopening: Callable[[Path], Checkpoint[H]],
    ranks: Ranks,
) -> Checkpoint[H] | None:
    """Open on every rank what `opening` finds on rank 0, by the path it has there; None where it
    finds nothing.

    `reopening` opens a path on the other ranks. AgreedError where a rank cannot open it, or sees
    other content under that path.
    """
    for tries_left in reversed(range(_TRIES)):
        opened: Checkpoint[H] | None = None
        error: ValueError | None = None
        try:
            opened = opening() if ranks.is_main else None
        except ValueError as raised:
            error = raised
        agree(error, ranks)
        said = "" if opened is None else f"{opened.header.header_sha256} {opened.path}"
        heard = all_gather_bytes(said.encode(), ranks.world, ranks.device, _PATH_BYTES)[0]
        digest, _, path = heard.decode().partition(" ")
        if not path:
            return None
        gone = False
        try:
            opened = opened or reopening(Path(path))
            gone = opened.header.header_sha256 != digest
            if gone:
                error = GoneError(
                    f"{path} is not on every host what rank 0 sees; start the same command again"
                )
        except GoneError as raised:
            gone = True
            error = raised
        except ValueError as raised:
            error = raised
        if not (any_rank(gone, ranks) and tries_left):
            agree(error, ranks)
            return opened
        time.sleep(_PAUSE_S)
    raise AssertionError


# --- writing --------------------------------------------------------------------------------------


def point_best_at(path: Path) -> None:
    """Make `best` beside `path` a link to it, in one step."""
    link = path.with_name(BEST)
    if link.is_dir() and not link.is_symlink():  # a copy of the run that followed the link
        remove(link)
    replace_link(link, path.name)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest step checkpoints, and the best checkpoints that neither they
    nor the link name."""
    steps = _steps(folder)
    for old in steps[:-keep]:
        remove(old)
    needed = {_followed(folder / BEST).name}
    for path in steps[-keep:]:
        needed |= _named_by(folder, path)
    for old in _ours(folder, BEST):
        if old.name not in needed:
            remove(old)


def _named_by(folder: Path, step: Path) -> set[str]:
    """Return the names of the best checkpoints that a step checkpoint may need to be resumed."""
    header = header_of(step)
    if header is None:
        return set()
    if not header.names_best:
        last = best_path(folder, header.position.step).name
        return {path.name for path in _ours(folder, BEST) if path.name <= last}
    named = header.best_checkpoint
    return {best_path(folder, named.step).name} if named else set()


def best_of(folder: Path, header: Header) -> Path | None:
    """Return the best checkpoint that a step checkpoint names by its header; None where it is not
    in the folder."""
    for path in [folder / BEST, *sorted(_ours(folder, BEST))]:
        found = header_of(path) if not path.is_symlink() else None
        if found is None or header.best is None:
            continue
        step = found.position.step
        if header.names_best:
            same = header.best_checkpoint == BestCheckpoint(step, found.attempt)
        else:
            same = found.best == header.best and step <= header.position.step
        if same:
            return path
    return None


def discard(folder: Path, *void: Path) -> None:
    """Remove checkpoints that no run may resume from or rank with; point the link at the best
    checkpoint before them, if there is one."""
    if _followed(folder / BEST) in void:
        remaining = [path for path in _steps(folder) if path not in void]
        header = header_of(remaining[-1]) if remaining else None
        best = best_of(folder, header) if header else None
        if best is not None and best not in void:
            point_best_at(best)
        else:
            remove(folder / BEST)
    for path in void:
        remove(path)


def settle(folder: Path, best: Path | None) -> None:
    """Remove what lies beyond the newest step checkpoint, and point the link at `best`.

    A best checkpoint that an older step checkpoint names stays, for a run that has to resume from
    there. Half-written folders of a killed process are removed too. A killed `settle` is repeated
    by the next start.
    """
    if not folder.is_dir():
        return
    link = folder / BEST
    if best is not None and best == link:  # a copy of the run that followed the link
        named = header_of(best)
        assert named is not None
        best = best_path(folder, named.position.step)
        remove(best)
        rename_folder(link, best)
    if best is not None:
        point_best_at(best)
    elif link.is_symlink() or link.exists():
        remove(link)
    headers = [header for path in _steps(folder) if (header := header_of(path))]
    needed = {
        path.name for path in (best, *(best_of(folder, header) for header in headers)) if path
    }
    for path in folder.iterdir():
        beyond = path.name.startswith(f"{BEST}-") and path.name not in needed
        if (_OURS.fullmatch(path.name) and (beyond or not (path / Header.FILE).is_file())) or (
            path.name.startswith(".") and path.name.endswith(".tmp")
        ):
            remove(path)
