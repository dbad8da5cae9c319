"""Choose the columns of a history file: those the model's shards were made from, or named ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.role_columns import serving_columns
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import Table, open_table


def history_columns(
    inputs: Sequence[str],
    reading: Reading,
    rule: PositiveRule | None,
    asked: Mapping[str, str | None],
    all_positive: bool = False,
    kind: str | None = None,
) -> tuple[Columns, list[str]]:
    """Return the columns to read, and notes for the user on how they were chosen.

    asked: names that the user gave, by role. The others come from the rule; where the file has no
    such user or item column, they are `user` and `item`. ValueError where a column is missing.
    """
    table = open_table(inputs, None, reading, kind)
    user, item = (asked.get("user"), asked.get("item"))
    remembered = (
        user or (rule.user_column if rule else "user"),
        item or (rule.item_column if rule else "item"),
    )
    plain = (user or "user", item or "item")
    # MovieLens has its own names
    of_format = (user or table.columns.user or "user", item or table.columns.item or "item")
    pairs = [remembered, plain, (remembered[0], plain[1]), (plain[0], remembered[1]), of_format]
    names, unused = _first_match(table, list(dict.fromkeys(pairs)))
    notes = [
        f"{table.files[0].where} has no column {wanted}, which the shards were made from; "
        f"column {names[role]} is read"
        for role, wanted in zip(("user", "item"), remembered, strict=True)
        if not asked.get(role)
        and rule is not None
        and wanted not in (names[role], names[role].split(":")[0])
        and reading.header
    ]
    existing = list(dict.fromkeys([*names.values(), *unused]))
    named = {**asked, "user": names["user"], "item": names["item"]}
    chosen = serving_columns(existing, rule, named, table.files[0].where, all_positive)
    columns = Columns(
        names["user"], names["item"], chosen.rating, time=chosen.time, optional_rating=False
    )
    return columns, [*notes, *chosen.notes]


def _first_match(
    table: Table, pairs: Sequence[tuple[str, str]]
) -> tuple[dict[str, str], list[str]]:
    """Return the names by role, and the other names, for the first pair of columns that exists.

    Raise the first error where no pair of a user and an item column exists.
    """
    errors: list[ValueError] = []
    for user, item in pairs:
        try:
            return table.with_columns(Columns(user, item, optional_rating=False)).match_columns()
        except ValueError as error:
            errors.append(error)
    raise errors[0]
