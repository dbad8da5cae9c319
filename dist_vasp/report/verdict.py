"""Which run is better, by how much: paired differences between the lists of the same users."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dist_vasp.compare.statistics import PRIMARY, Estimate, Scores, paired
from dist_vasp.report.measured import POPULARITY, Measured
from dist_vasp.report.view import View

_NO_LISTS = "no lists were made (--users 0)."


@dataclass(frozen=True)
class Against:
    """The difference between a model and another one, and the value of the other one."""

    name: str
    difference: Estimate
    value: Estimate

    @property
    def word(self) -> str:
        """Return better, worse or `no different` at two standard errors of the difference."""
        if not self.difference.differs:
            return "no different"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass(frozen=True)
class Judged:
    """NDCG@100 of one run, and what it differs by from the others; None where it is the other
    one, or where that has no lists of the same users."""

    view: View
    value: Estimate
    popularity: Against
    ease: Against | None = None
    best: Against | None = None


@dataclass(frozen=True)
class Verdict:
    """The runs whose lists were measured, the best one first, and what is not known.

    commands: what a user would type to compare with EASE; empty where that is done.
    """

    judged: list[Judged] = field(default_factory=list)
    split: str = ""
    n_users: int = 0
    n_split: int = 0
    ease: str = ""
    missing: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def best(self) -> str:
        """Return the name of the best of several runs that is ahead of the second; "" if none."""
        if len(self.judged) < 2:
            return ""
        second = self.judged[1].best
        return self.judged[0].view.run.name if second and second.difference.differs else ""


def judge(views: Sequence[View]) -> Verdict:
    """Compare the runs with popularity, with EASE and with the best of them, user by user."""
    missing = [
        f"{view.run.name} is not compared: {view.lists.why_not or _NO_LISTS}"
        for view in views
        if view.lists.measured is None
    ]
    known = [view for view in views if view.lists.measured is not None]
    first = known[0].lists.measured if known else None
    if first is None:
        return Verdict(missing=missing)
    same = [view for view in known if _is_same_data(view, first)]
    missing += [
        f"{view.run.name} is not compared: its users or their held-out items are not those of "
        f"{known[0].run.name}; --shards names one folder for all."
        for view in known
        if view not in same
    ]
    same.sort(key=lambda view: -_scores(view).estimate(PRIMARY).mean)
    ease = next((view for view in same if view.run.is_plain_ease), None)
    judged = [_judged(view, same[0], ease) for view in same]
    value = first.model.estimate(PRIMARY)
    commands = [] if ease else _commands(same[0])
    name = ease.run.name if ease else ""
    return Verdict(judged, first.split, value.n, first.n_split, name, missing, commands)


def _is_same_data(view: View, first: Measured) -> bool:
    """Whether a run was measured on the users of `first`; popularity tells their held-out items."""
    measured = view.lists.measured
    assert measured is not None
    ours, theirs = (of.popularity.values[PRIMARY] for of in (measured, first))
    return np.array_equal(measured.model.keys, first.model.keys) and np.array_equal(
        ours, theirs, equal_nan=True
    )


def _judged(view: View, best: View, ease: View | None) -> Judged:
    assert view.lists.measured is not None
    return Judged(
        view,
        _scores(view).estimate(PRIMARY),
        _against(view, POPULARITY, view.lists.measured.popularity),
        None if ease is None or ease is view else _against(view, "EASE", _scores(ease)),
        None if best is view else _against(view, best.run.name, _scores(best)),
    )


def _scores(view: View) -> Scores:
    assert view.lists.measured is not None
    return view.lists.measured.model


def _against(view: View, name: str, other: Scores) -> Against:
    return Against(name, paired(_scores(view), other, PRIMARY), other.estimate(PRIMARY))


def _commands(view: View) -> list[str]:
    """Return the commands that train EASE on the data of a run, and report on both."""
    assert view.lists.measured is not None
    folder, shards = str(view.run.folder), view.lists.measured.shards
    ease = f"{folder.rstrip('/')}-ease"
    train = ["dist-vasp", "train", "--model.kind", "ease", "--model.ease_lambda", "0"]
    train += ["--shards", shards, "--run", ease]
    report = ["dist-vasp", "report", folder, ease, "--shards", shards]
    return [shlex.join(train), shlex.join(report)]
