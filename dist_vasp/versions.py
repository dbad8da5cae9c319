"""The version of this package, and of installed libraries."""

from __future__ import annotations

__version__ = "0.1.0"


def version(library: str) -> str | None:
    """Return the version of `library`, None where it is not installed."""
    from importlib import metadata  # not whenever the package is imported

    if library == "dist_vasp":  # a checkout need not be installed
        return __version__
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
