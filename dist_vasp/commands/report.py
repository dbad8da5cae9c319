"""Write one self-contained HTML page on a run, or on several side by side."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from dist_vasp.command_line import Parser
from dist_vasp.commands.ending import rank_parser
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.tables.read import Table
from dist_vasp.files import new_file
from dist_vasp.places import check_file
from dist_vasp.progress import counting
from dist_vasp.recommender import Recommender
from dist_vasp.report.by_time import latest_first, open_times, times_of
from dist_vasp.report.gather import Run, read_runs
from dist_vasp.report.lists import Lists, Wanted, make_lists
from dist_vasp.report.page import is_report, page


def parser() -> Parser:
    parser = rank_parser("report", __doc__ or "")
    parser.add_argument("words", nargs="*", metavar="RUN", help="the same as --run RUN")
    parser.add_argument(
        "--run",
        dest="runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="folders of training runs, at most 6",
    )
    parser.add_argument(
        "--output",
        "--out",
        dest="output",
        metavar="FILE.html",
        help="default: report.html in the first RUN",
    )
    parser.add_argument(
        "--shards",
        metavar="DIR",
        help="data folder for lists of test users; default: the one of each run",
    )
    parser.add_argument(
        "--users",
        type=int,
        default=2000,
        help="test users whose lists are counted; 0 makes no lists (default 2000)",
    )
    parser.add_argument(
        "--samples", type=int, default=3, help="test users who are shown in full (default 3)"
    )
    parser.add_argument("--k", type=int, default=10, help="items of a shown list (default 10)")
    parser.add_argument(
        "--histories",
        metavar="FILE",
        help="the interactions that the shards were made from: puts histories in order of time",
    )
    parser.add_argument(
        "--time_column",
        metavar="NAME",
        help="column of --histories; default: that of the shards, else timestamp",
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="FILE",
        help="benchmark.json; default: one in RUN",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folders = [*arguments.words, *arguments.runs]
    if not folders:
        raise ValueError(
            "the following arguments are required: --run; `--help-all` lists all options"
        )
    for name, low in (("users", 0), ("samples", 0), ("k", 1)):
        if getattr(arguments, name) < low:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least {low}")
    out = Path(arguments.output or Path(folders[0]) / "report.html")
    if arguments.shards:
        Manifest.load(
            arguments.shards
        )  # data that was named must be there; that of a run may have gone
    runs = read_runs(folders, arguments.benchmark)
    check_file(out, "--output", ours=is_report)
    if arguments.time_column and not arguments.histories:
        raise ValueError("--time_column is of --histories, which is missing; add --histories FILE")
    times = (
        _open_times(runs[0], arguments.histories, arguments.time_column)
        if arguments.histories
        else None
    )
    wanted = Wanted(arguments.users, arguments.samples, arguments.k)
    lists = [_lists(one, arguments.shards, wanted) for one in runs]
    if times is not None:
        users = {sample.user for one in lists for sample in one.samples}
        lists = latest_first(lists, times_of(times, users))
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    with new_file(out, "--output", ours=is_report) as file:
        file.write(page(runs, lists, date).encode())
    print(
        f"{out}: {os.path.getsize(out) / 1e3:,.0f} kB on {', '.join(one.name for one in runs)}; "
        "open it in a browser"
    )


def _open_times(first: Run, histories: str, time_column: str | None) -> Table:
    """Open --histories with the columns that the first run's data was made from."""
    try:
        rule = Recommender.load(first.folder, verify=False).positives
    except ValueError:  # the run has no model yet, and no lists
        rule = None
    return open_times(histories, rule, time_column)


def _lists(one: Run, shards: str | None, wanted: Wanted) -> Lists:
    """Return the lists of the run's model.

    A run without a model or data is reported without them; a wrong --shards is an error.
    """
    folder = shards or str(one.at("data", "shards") or "")
    if not wanted.n_users:
        return Lists()
    if not folder or not Path(folder).is_dir():
        why_not = f"The data folder {folder} is not at hand, so there are no lists here; "
        return Lists(why_not=f"{why_not}--shards DIR names it.")
    try:
        with counting(f"lists of {one.name}", "user") as show:
            recommender = Recommender.load(one.folder)
            return make_lists(recommender, folder, wanted, show, one.name, one.recall_denominator)
    except ValueError as error:
        if shards:
            raise
        return Lists(why_not=f"No lists: {error}.")
