"""Several runs as one model that ranks by the product of theirs: python launch/ensemble.py --members RUN ... --output DIR

Score = sum over members of weight * log p (of ease: weight * x B). launch/evaluate.py and launch/recommend.py take DIR as --run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from data_tools.cli import Parser
from dist_vasp.ranking.ensemble import describe_ensemble, is_ensemble
from dist_vasp.ranking.load import ENSEMBLE
from dist_vasp.training.run_dir import write_atomically
from launch.cli import run


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="ensemble.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", required=True, metavar="RUN", help="folders of training runs or exports")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each member, in the same order; default: 1 each"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; one that holds an ensemble is replaced")
    arguments = parser.parse_args(argv)
    folder, weights = Path(arguments.output), arguments.weights or [1.0] * len(arguments.members)
    if folder.exists() and not is_ensemble(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {folder} holds something else than an ensemble; choose another folder")
    text = describe_ensemble(folder, arguments.members, weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made ({error.strerror}); choose another folder") from None
    write_atomically(folder / ENSEMBLE, text, "choose another --output")
    listed = ", ".join(f"{weight:g} x {run}" for run, weight in zip(arguments.members, weights, strict=True))
    print(f"{folder / ENSEMBLE}: {len(json.loads(text)['members'])} members, {listed}")


if __name__ == "__main__":
    run(main)
