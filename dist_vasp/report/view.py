"""What a page shows of a run: the files it has left, and the lists that its model makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_vasp.report.gather import Run
from dist_vasp.report.lists import Popularity, Sample


@dataclass(frozen=True)
class Lists:
    """What the model of one run recommends; without it `why_not` says why."""

    popularity: Popularity | None = None
    samples: list[Sample] = field(default_factory=list)
    why_not: str = ""


@dataclass(frozen=True)
class View:
    """One run of a report with its lists; `colour` is 1 to 6."""

    colour: int
    run: Run
    lists: Lists
