"""Triton's interpreter, in which tests run the kernels of a GPU on CPUs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest
from packaging.version import Version


def _installed() -> Version:
    try:
        return Version(version("triton"))
    except PackageNotFoundError:  # modules skip their tests without it
        return Version("3.7")


# For tests that run in the interpreter.
interpreted = pytest.mark.skipif(
    _installed() < Version("3.7") and Version(np.__version__) >= Version("2.3"),
    reason="the interpreter of triton before 3.7 fails with numpy 2.3 and later",
)
