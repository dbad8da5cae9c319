"""Libraries that a plain `pip install dist-vasp` leaves out, and the extra that brings each."""

from __future__ import annotations

from importlib import util

EXTRAS = {
    "deepspeed": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "fastapi": "serve",
    "uvicorn": "serve",
    "pyspark": "spark",
}


def has_library(library: str) -> bool:
    """Return whether `library` can be imported."""
    try:
        return util.find_spec(library) is not None
    except ValueError:  # a test has put another module in its place
        return False


def how_to_install(library: str) -> str:
    """Return the command that installs `library`."""
    extra = EXTRAS.get(library)
    return f'pip install "dist-vasp[{extra}]"' if extra else f"pip install {library}"


def require_library(library: str, what: str) -> None:
    """Raise ValueError unless `library` is installed; `what` needs it."""
    if not has_library(library):
        raise ValueError(
            f"{what} needs {library}, which is not installed; {how_to_install(library)}"
        )


def about_missing(error: ImportError) -> str | None:
    """Return how to install what could not be imported; None where an extra does not bring it."""
    library = (error.name or "").partition(".")[0]
    if library not in EXTRAS:
        return None
    return f"{library} is not installed; {how_to_install(library)}"
