"""Which columns of the histories' files a model reads: those its shards were made from, or the ones
that are named."""

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
    """The columns to read, and lines for the user on what was chosen.

    asked: by role, what the user named. The rest is what the rule remembers; where a file has no
    such user or item column, `user` and `item`. ValueError where a column is not there.
    """
    table = open_table(inputs, None, reading, kind)
    user, item = (asked.get("user"), asked.get("item"))
    remembered = (
        user or (rule.user_column if rule else "user"),
        item or (rule.item_column if rule else "item"),
    )
    plain = (user or "user", item or "item")
    of_format = (
        user or table.columns.user or "user",
        item or table.columns.item or "item",
    )  # MovieLens has names of its own
    pairs = [remembered, plain, (remembered[0], plain[1]), (plain[0], remembered[1]), of_format]
    names, unused = _look(table, list(dict.fromkeys(pairs)))
    notes = [
        (
            f"{table.files[0].where} has no column {wanted}, which the shards were made from; column "
            f"{names[role]} is read"
        )
        for role, wanted in zip(("user", "item"), remembered, strict=True)
        if not asked.get(role)
        and rule is not None
        and wanted not in (names[role], names[role].split(":")[0])
        and reading.header
    ]
    there = list(dict.fromkeys([*names.values(), *unused]))
    found = {**asked, "user": names["user"], "item": names["item"]}
    chosen = serving_columns(there, rule, found, table.files[0].where, all_positive)
    columns = Columns(
        names["user"], names["item"], chosen.rating, time=chosen.time, optional_rating=False
    )
    return columns, [*notes, *chosen.notes]


def _look(table: Table, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Names by role and other names with the first pair of a user and an item column that is there;
    the first error else."""
    errors: list[ValueError] = []
    for user, item in pairs:
        try:
            return table.with_columns(Columns(user, item, optional_rating=False)).match_columns()
        except ValueError as error:
            errors.append(error)
    raise errors[0]
