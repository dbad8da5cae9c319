"""The configurations that come with the package: configs/ of a checkout, or of an installation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> dict[str, Path]:
    """Return the files by name, without the ending `.yaml`."""
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """Return `path` if it exists, else the shipped configuration that it names, if it names one.

    NAME, NAME.yaml and configs/NAME.yaml name one. Rank 0 says on standard error which file it is.
    """
    given = Path(path)
    if given.parent not in (Path("."), Path("configs")) or given.suffix not in ("", ".yaml"):
        return given
    shipped = shipped_configs().get(given.name.removesuffix(".yaml"))
    if shipped is None or given.is_file():
        return given
    if os.environ.get("RANK", "0") == "0":
        print(f"{path} is not here; using {shipped}", file=sys.stderr)
    return shipped
