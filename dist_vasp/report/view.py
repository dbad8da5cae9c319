"""What a page shows of a run: the files it has left, and the lists that its model makes."""

from __future__ import annotations

from dataclasses import dataclass

from dist_vasp.report.gather import Run
from dist_vasp.report.lists import Lists


@dataclass(frozen=True)
class View:
    """One run of a report with its lists; `colour` is 1 to 6."""

    colour: int
    run: Run
    lists: Lists
