"""Which items may be listed, for all users or for each, as a Python caller says it.

`filter_items` and `restrict_to` are a list of ids for all users, a list of such lists (one for each
history), or, where the histories are a table, a mapping of user ids to lists.

Shapes: U users, C columns of a block, I items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dist_vasp.data.rows import Rows
from dist_vasp.model.sparse import ItemRows
from dist_vasp.ranking.accepted import find_ids, id_list, refuse_frame
from dist_vasp.ranking.evaluate import to_item_rows
from dist_vasp.ranking.filters import counted
from dist_vasp.ranking.histories import known_rows


@dataclass(frozen=True)
class Listable:
    """The items that may be listed for U users.

    everyone: (I,) bool, what may be listed for some user; None: all items. hidden: items that are
    not listed for a user. only: the only items that are listed for a user.
    """

    everyone: Tensor | None = None
    hidden: Rows | None = None
    only: Rows | None = None
    notes: tuple[str, ...] = ()

    def masked(
        self, blocks: Iterable[tuple[int, Tensor]], users: np.ndarray, n_items: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the blocks of scores (U, C) with -inf for what may not be listed.

        users (U,): the rows of `hidden` and `only` that the rows of the blocks belong to.
        """
        hidden, only = (
            None if rows is None else _item_rows(rows.take(users), n_items)
            for rows in (self.hidden, self.only)
        )
        for lo, scores_UC in blocks:
            hi = lo + scores_UC.shape[1]
            if self.everyone is not None:
                scores_UC[:, ~self.everyone[lo:hi]] = -torch.inf
            if only is not None:
                at = only.positions(lo, hi)
                kept = scores_UC[at]
                scores_UC.fill_(-torch.inf)
                scores_UC[at] = kept
            if hidden is not None:
                scores_UC[hidden.positions(lo, hi)] = -torch.inf
            yield lo, scores_UC


def _item_rows(rows: Rows, n_items: int) -> ItemRows:
    return to_item_rows(rows, rows.n_rows, n_items, torch.device("cpu"))


@dataclass(frozen=True)
class UserFilters:
    """Reads filters against the vocabulary `items` (I,) and the users of the histories.

    users: their ids, None where the histories have none.
    """

    items: pa.Array
    users: pa.Array | None
    n_users: int

    def read(self, filter_items: Any, restrict_to: Any) -> Listable:
        """Return what may be listed; ValueError where that is no item, or a filter is no filter."""
        if filter_items is None and restrict_to is None:
            return Listable()
        n_items = len(self.items)
        everyone, notes = np.ones(n_items, bool), []
        rows: dict[str, Rows | None] = {"restrict_to": None, "filter_items": None}
        for name, given in (("restrict_to", restrict_to), ("filter_items", filter_items)):
            if given is None:
                continue
            refuse_frame(given, name)
            per_user = self._per_user(given, name)
            lists = [id_list(given, name)] if per_user is None else per_user
            found = find_ids([*chain.from_iterable(lists)], self.items, name)
            notes.append(counted(name, len(found), int((found < 0).sum())))
            listed = found[found >= 0]
            if per_user is not None:
                owner = np.repeat(np.arange(self.n_users), [len(one) for one in lists])
                rows[name] = known_rows(owner, found, self.n_users, n_items)
            if name == "restrict_to":
                everyone[:] = False
                everyone[listed] = True
            elif per_user is None:
                everyone[listed] = False
        if not everyone.any():
            raise ValueError(
                "filter_items and restrict_to leave no item that the model knows; pass other ids"
            )
        allowed = None if everyone.all() else torch.from_numpy(everyone)
        return Listable(allowed, rows["filter_items"], rows["restrict_to"], tuple(notes))

    def _per_user(self, given: Any, name: str) -> list[list[Any]] | None:
        """Return the ids for each user; None where they are the same for all users."""
        if isinstance(given, Mapping):
            return self._of_mapping(given, name)
        lists = list(given) if isinstance(given, list | tuple) else []
        if not any(isinstance(one, Iterable) and not isinstance(one, str | bytes) for one in lists):
            return None
        if self.users is not None:
            raise ValueError(
                f"{name} is a list of lists, but the histories are a table, whose users have ids; "
                "pass a mapping {user: [item, ...]}"
            )
        if len(lists) != self.n_users:
            raise ValueError(
                f"{name} has lists for {len(lists):,} users, the histories are those of "
                f"{self.n_users:,}; pass one list for each history, or one list of ids for all"
            )
        return [id_list(one, f"{name} of history {u}") for u, one in enumerate(lists)]

    def _of_mapping(self, given: Mapping[Any, Any], name: str) -> list[list[Any]]:
        if self.users is None:
            raise ValueError(
                f"{name} is a mapping of users, but the histories have no user ids; pass a list of "
                "ids for each history"
            )
        lists: list[list[Any] | None] = [None] * self.n_users
        users = find_ids(list(given), self.users, f"the users of {name}")
        for u, (user, ids) in zip(users, given.items(), strict=True):
            if u >= 0:
                lists[u] = id_list(ids, f"{name} of user {user!r}")
        missing = lists.index(None) if name == "restrict_to" and None in lists else -1
        if missing >= 0:
            raise ValueError(
                f"restrict_to has no list for user {self.users[missing].as_py()!r}; pass one for "
                "every user of the histories"
            )
        return [one or [] for one in lists]
