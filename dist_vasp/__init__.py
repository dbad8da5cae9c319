"""Distributed training of VASP recommenders.

`from dist_vasp import Recommender` is the public name. It is imported on first use, so that
importing the package loads nothing.
"""

from typing import TYPE_CHECKING, Any

from dist_vasp.versions import __version__

if TYPE_CHECKING:
    from dist_vasp.recommender import Recommender

__all__ = ["Recommender", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Recommender":
        from dist_vasp.recommender import Recommender

        return Recommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
