"""Combine several runs into one model, whose score is the product of theirs.

Score = sum over members of weight * log p (of ease: weight * x B). The commands evaluate,
recommend, export and report take the folder as --run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dist_vasp.command_line import Parser, program
from dist_vasp.files import parents, replace_text, sole_writer
from dist_vasp.places import check_belongs_to_nothing
from dist_vasp.ranking.ensemble import describe_ensemble, is_ensemble
from dist_vasp.ranking.load import ENSEMBLE
from dist_vasp.recognise import is_json


def parser() -> Parser:
    parser = Parser(prog=program("ensemble"), description=__doc__)
    parser.add_argument(
        "--members",
        "--run",
        nargs="+",
        required=True,
        metavar="RUN",
        help="folders of training runs or exports",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one for each member, in the same order; default: 1 each",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder to write; one that holds an ensemble is replaced",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folder, weights = Path(arguments.output), arguments.weights or [1.0] * len(arguments.members)
    _check_output(folder)
    text = describe_ensemble(folder, arguments.members, weights)
    file = folder / ENSEMBLE
    with parents(file, "--output"), sole_writer(file, "--output"):
        _check_output(folder)  # another command may have written it until now
        replace_text(file, text, "choose another --output")
    listed = ", ".join(
        f"{weight:g} x {run}" for run, weight in zip(arguments.members, weights, strict=True)
    )
    print(f"{folder / ENSEMBLE}: {len(json.loads(text)['members'])} members, {listed}")


def _check_output(folder: Path) -> None:
    """Raise ValueError unless the folder is new, empty, or holds an ensemble to replace."""
    check_belongs_to_nothing(folder, "--output")
    file = folder / ENSEMBLE
    ours = (
        is_ensemble(folder)
        and not file.is_symlink()
        and (not file.stat().st_size or _holds_members(file))
    )
    if (
        folder.exists()
        and not ours
        and (not folder.is_dir() or any(p.name != f".{ENSEMBLE}.lock" for p in folder.iterdir()))
    ):
        raise ValueError(
            f"--output {folder} holds something else than an ensemble; choose another folder"
        )


_holds_members = is_json(lambda found: "members" in found and "vocabulary_sha256" in found)
