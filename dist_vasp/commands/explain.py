"""Say in words why items are recommended: to users of a file, or to one history.

Each item comes with the past items that add most to its score. --item asks about one item, which
need not be on the list.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dist_vasp.command_line import Parser, at_least
from dist_vasp.commands.ending import rank_parser
from dist_vasp.data.tables.options import add_reading_options, reading_of
from dist_vasp.ranking.history_columns import history_columns
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.lists import Explanation, Id
from dist_vasp.recommender import Recommender

_USERS_PER_BLOCK = 1024


@dataclass(frozen=True)
class _User:
    """A user with known likes."""

    name: str
    likes: list[Id]
    seen: list[Id]


def parser() -> Parser:
    parser = rank_parser("explain", __doc__ or "")
    add = parser.add_argument
    add("--run", metavar="DIR", required=True, help="training run, export, or ensemble")
    add("--history", nargs="+", metavar="ITEM", help="the past items of one user, original ids")
    add(
        "--histories",
        nargs="+",
        metavar="FILE",
        help="CSV or Parquet with original ids, as for recommend",
    )
    add("--user", metavar="ID", help="of --histories; default: the first --users of them")
    add("--users", type=at_least(1), default=3, metavar="N", help="default 3")
    add("--item", metavar="ITEM", help="why this one; default: the items of the list")
    add("--k", type=at_least(1), default=3, help="items of a list (default 3)")
    add("--reasons", type=at_least(1), default=3, metavar="N", help="past items (default 3)")
    add("--checkpoint", metavar="NAME", help="folder under RUN/checkpoints; default: best")
    add("--user_column", metavar="NAME", help="default: that of the shards, else user")
    add("--item_column", metavar="NAME", help="default: that of the shards, else item")
    parser.hide("device", *add_reading_options(parser))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if (arguments.history is None) == (arguments.histories is None):
        raise ValueError("expected either --histories FILE or --history ITEM ...; pass one of them")
    if arguments.user is not None and arguments.histories is None:
        raise ValueError("--user names one of --histories FILE, which is missing; add it")
    model = Recommender.load(arguments.run, arguments.checkpoint)
    n_told = 0
    for user in _users(model, arguments):
        if n_told == (1 if arguments.user is not None else arguments.users):
            break
        print(("\n" if n_told else "") + "\n".join(_lines(model, user, arguments)))
        n_told += 1
    if not n_told:
        who = "user" if arguments.user is None else f"user {arguments.user}"
        raise ValueError(
            f"{' '.join(arguments.histories)} holds no {who} with a liked item that the model "
            "knows; name another"
        )


def _users(model: Recommender, arguments: argparse.Namespace) -> Iterator[_User]:
    """Yield the users that are asked for; others may follow."""
    if arguments.history is not None:
        history = [_id(model, text) for text in arguments.history]
        yield _User("this history", history, [])
        return
    files, rule, reading = arguments.histories, model.positives, reading_of(arguments)
    if rule is not None and rule.missing is not None:
        reading = reading_of(arguments, rule.missing)
    asked = {"user": arguments.user_column, "item": arguments.item_column}
    columns, _ = history_columns(files, reading, rule, asked)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_histories(files, scratch, columns, reading, rule, None) as histories,
    ):
        for block in histories.blocks(model.items, _USERS_PER_BLOCK):
            for place, user in enumerate(block.users.to_pylist()):
                if arguments.user is None or str(user) == arguments.user:
                    likes, seen = (
                        model.items.ids.take(rows.take(np.array([place])).items).to_pylist()
                        for rows in (block.rows, block.seen)
                    )
                    yield _User(f"user {user}", likes, seen)


def _lines(model: Recommender, user: _User, arguments: argparse.Namespace) -> list[str]:
    """Return what is said of one user."""
    if arguments.item is not None:
        items = [_id(model, arguments.item)]
    else:
        lists = model.recommend([user.likes], k=arguments.k, filter_items=[user.seen])
        items = lists.ids[0][lists.rows[0] >= 0].tolist()
    past = ", ".join(_name(model, item) for item in user.likes[:10])
    more = f" and {len(user.likes) - 10} more" if len(user.likes) > 10 else ""
    lines = [f"{user.name} likes {past}{more}"]
    if not items:
        lines.append("  there is no item left to recommend")
    for place, item in enumerate(items):
        why = model.explain(user.likes, item, n=arguments.reasons)
        lines.append(f"  {place + 1}. {_name(model, item)}: {in_words(why)}")
    return lines


def in_words(why: Explanation) -> str:
    """Return an explanation as one phrase: the score, its factors, and the past items behind it."""
    if why.p is not None:
        score = f"p {why.p:.3f}"
        if why.p_flvae is not None and why.p_nease is not None:
            score += f" = deep {why.p_flvae:.3f} x shallow {why.p_nease:.3f}"
    else:
        score = "score" if why.logit is None else f"score {why.logit:.3f}"
    reasons = ", ".join(
        f"{reason.title or reason.item} ({reason.weight:+.2f})" for reason in why.reasons
    )
    return f"{score}, because of {reasons}" if reasons else f"{score}; the model names no past item"


def _name(model: Recommender, item: Id) -> str:
    title = model.title(item)
    return f"{title} ({item})" if title else str(item)


def _id(model: Recommender, text: str) -> Id:
    """Return an item as the vocabulary writes it: a number where its ids are numbers."""
    if not str(model.items.ids.type).startswith("int"):
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an item of the model, whose ids are numbers") from None
