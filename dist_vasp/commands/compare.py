"""Train and test a list of models, and say which is best.

Writes report.html, report.md, report.json and per_user.parquet into DIR. Finished runs are not
repeated; interrupted ones are resumed. `--section.key value` overrides a key of every trained
model.
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_vasp.command_line import Parser, program
from dist_vasp.compare.config import Comparison
from dist_vasp.compare.gather import gather, is_per_user_of_all, write_per_user
from dist_vasp.compare.jobs import Jobs, Stopped
from dist_vasp.compare.read import read_comparison
from dist_vasp.compare.report import markdown
from dist_vasp.compare.runs import carry_out, count_runs, data_sha256, plan
from dist_vasp.data.manifest import Manifest
from dist_vasp.files import parents, replacing_all, sole_writer
from dist_vasp.parallel.partition import Layout
from dist_vasp.places import check_file, check_own_folder, unwritable
from dist_vasp.recognise import begins_with, is_json
from dist_vasp.report.comparison import comparison_page
from dist_vasp.report.page import is_report
from dist_vasp.signals import INTERRUPTED
from dist_vasp.text import printable

REPORT, PAGE = "report.json", "report.html"
_REMEDY = "choose another --output"


def parser() -> Parser:
    parser = Parser(prog=program("compare"), description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML file of a comparison, such as configs/compare.yaml",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder for the runs and the report; the same one resumes",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAMES",
        default="",
        help="further metrics of every model, such as ndcg@10,hr@10,novelty@10, in place of the "
        "file's",
    )
    parser.add_argument("--shards", metavar="DIR", help="data folder in place of the file's")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="ranks of each training and evaluation (default 1)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the configurations, say what would be trained, and stop",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser().parse_known_args(argv)
    more = _overrides(rest) | ({"shards": arguments.shards} if arguments.shards else {})
    comparison = read_comparison(arguments.config, more, arguments.metrics)
    if arguments.ranks < 1:
        raise ValueError(f"--ranks is {arguments.ranks}, expected at least 1")
    for model in comparison.models:
        if model.config:
            Layout.of(
                arguments.ranks, model.config.parallel.partitions, model.config.parallel.replicas
            )
    output, data = Path(arguments.output), data_sha256(Manifest.load(comparison.shards))
    if arguments.dry_run:
        print(plan(comparison, output, data))
        return 0

    _check(output, arguments.config)
    with parents(output / REPORT, "--output"), sole_writer(output / REPORT, "--output"):
        return _compare(
            comparison,
            output,
            data,
            arguments.ranks,
            shlex.join(["python", "launch/compare.py", *argv]),
        )


def _compare(comparison: Comparison, output: Path, data: str, ranks: int, command: str) -> int:
    """Bring all runs to their end, write the reports, and return the exit status."""
    start = time.monotonic()
    runs, jobs = comparison.runs(output), Jobs()
    _make(output)
    device = next((model.config.device for model in comparison.models if model.config), "auto")
    try:
        with jobs.stoppable():
            failures = carry_out(runs, comparison, data, ranks, jobs, _say, device)
    except Stopped:
        _say("stopped on request; the same command resumes from here")
        return INTERRUPTED if jobs.interrupted else 1
    failed = (
        f"{count_runs(len(failures))} failed: {', '.join(failure.run.stem for failure in failures)}"
    )
    try:
        found = gather(comparison, output, failures, command)
    except ValueError as error:
        if not failures:
            raise
        print(f"error: {failed}; {error}", file=sys.stderr)
        return 1
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = (REPORT, "report.md", PAGE, "per_user.parquet")
    with replacing_all(output, names, _REMEDY) as (report, text, page, per_user):
        report.write((json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        text.write(printable(markdown(found)).encode())
        page.write(comparison_page(found, date).encode())
        write_per_user(per_user, comparison, output, {failure.run.stem for failure in failures})
    _say(
        f"\n{found['verdict']}\n\n{output / PAGE}: {len(runs) - len(failures)} runs in "
        f"{time.monotonic() - start:.0f} s"
    )
    if failures:
        print(f"error: {failed}", file=sys.stderr)
    return 1 if failures else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _check(folder: Path, config: str) -> None:
    """Raise ValueError unless the reports are new or replace those of an earlier comparison."""
    inputs = [("--config", config)]
    recognised = {
        REPORT: _is_report,
        "report.md": begins_with(b"# Comparison on "),
        PAGE: is_report,
        "per_user.parquet": is_per_user_of_all,
    }
    for name, ours in recognised.items():
        check_file(folder / name, "--output", ours=ours, inputs=inputs, make_parents=True)
    check_own_folder(folder / "runs")


_is_report = is_json(lambda found: {"verdict", "reference", "models"} <= set(found))


def _make(folder: Path) -> None:
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, folder, "--output") from None


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """Return the keys of `--section.key value` or `--section.key=value`, as train.py takes them."""
    found: dict[str, Any] = {}
    waiting = list(rest)
    while waiting:
        name, given, value = waiting.pop(0).partition("=")
        if not name.startswith("--") or ("." not in name and name != "--device"):
            raise ValueError(
                f"{name} is not an option; `--help` lists them, and a key of every model is "
                "--section.key value"
            )
        if not given:
            if not waiting:
                raise ValueError(f"{name} has no value; write {name} VALUE")
            value = waiting.pop(0)
        try:
            found[name.removeprefix("--")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(
                f"{name} is {value!r}, which is not a value in YAML; correct it"
            ) from None
    return found
