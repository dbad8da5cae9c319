"""Names of the columns to read, the format of the text, and the search for columns by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dist_vasp.data import ids

ROLES = ("user", "item", "rating", "split", "time", "title")
_TYPED = re.compile(r"(.+):(token|float|token_seq|float_seq)")  # RecBole writes user_id:token
_ATOMIC = {"user": "user_id", "item": "item_id", "rating": "rating", "time": "timestamp"}
_SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read, None for a role that is not read.

    `rating` None reads the column `rating` if there is one and `optional_rating` is True.
    """

    user: str | None = "user"
    item: str | None = "item"
    rating: str | None = None
    split: str | None = None
    time: str | None = None
    title: str | None = None
    optional_rating: bool = True


@dataclass(frozen=True)
class Reading:
    """How the files are written. None: detect it from the file."""

    delimiter: str | None = None  # of a CSV: one character, or ::
    encoding: str | None = None  # of a CSV; None: UTF-8, or what a byte order mark says
    header: bool = True  # False: the first line is data and columns are named 1, 2, ...
    names: tuple[str, ...] = ()  # of the columns of a file without a header; (): numbers
    quoting: bool = True  # False: a quote is a character like any other
    missing: tuple[str, ...] = (
        ids.MISSING
    )  # texts that stand for a missing id, besides the empty one


class MissingColumnError(ValueError):
    """A column to be read is missing."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name


def without_constants(
    columns: Columns, constants: Collection[str], names: Sequence[str]
) -> Columns:
    """Return the columns to look for among `names`.

    Columns that only the names of folders give (`constants`) are left out.
    """
    given = set(constants) - {name.strip() for name in names}
    absent = {role: None for role in ROLES if getattr(columns, role) in given}
    return replace(
        columns, **absent, optional_rating=columns.optional_rating and "rating" not in given
    )


def find_columns(
    names: Sequence[str], columns: Columns, where: str, header: bool = True
) -> dict[str, int]:
    """Return the positions of the columns among `names`, by role.

    A name matches exactly or, where that is unambiguous, without the blanks around it. ValueError
    names the missing column, the columns of the file, and the option to use.
    """
    plain = [name.strip() for name in names]
    typed = [match[1] if (match := _TYPED.fullmatch(name)) else None for name in plain]
    positions: dict[str, int] = {}
    for role in ROLES:
        name = getattr(columns, role)
        optional = name is None and role == "rating" and columns.optional_rating
        if optional:
            name = "rating"
        if name is None:
            continue
        if not header and name == role:
            name = {"user": "1", "item": "2"}.get(role, name)
        places = [i for i, one in enumerate(names) if one == name] or [
            i for i, one in enumerate(plain) if one == name
        ]
        if not places and any(typed):
            wanted = _ATOMIC.get(role, name) if name in (role, "timestamp") else name
            places = [i for i, one in enumerate(typed) if one in (name, wanted)]
        if len(places) == 1:
            positions[role] = places[0]
        elif not optional or places:
            text = f"{where} {_problem(role, name, len(places), plain, header)}"
            raise ValueError(text) if places else MissingColumnError(text, name)
    _check_distinct(positions, names, where)
    return positions


def _check_distinct(positions: dict[str, int], names: Sequence[str], where: str) -> None:
    """ValueError where one column is named for two roles."""
    for role, place in positions.items():
        other = next((r for r, p in positions.items() if p == place and r != role), None)
        if other is not None:
            raise ValueError(
                f"{where}: column {names[place]!r} is named as {role} and as {other}; name "
                "another for one of them"
            )


def shown(names: Sequence[str]) -> str:
    """Return the names for a message: at most twenty, of at most 40 characters."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return (
        ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:_SHOWN])
        + more
        or "none"
    )


def _problem(role: str, name: str, n_found: int, names: Sequence[str], header: bool) -> str:
    if n_found:
        return f"has more than one column {name!r}; rename one of them"
    if not header:
        return (
            f"has no column {name!r}; it has {len(names)} columns, named 1 to {len(names)}; pass "
            f"--{role}_column N"
        )
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names[:1000]], 1, 0.6)
    like = next((f" (is it {n!r}?)" for n in names if close and n.lower() == close[0]), "")
    return (
        f"has no column {name!r}; its columns are {shown(names)}; pass --{role}_column NAME{like}"
    )
