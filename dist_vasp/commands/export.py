"""Write a trained model as one folder, without its training."""

from __future__ import annotations

from collections.abc import Sequence

from dist_vasp.command_line import Parser
from dist_vasp.commands.ending import rank_parser
from dist_vasp.progress import counting
from dist_vasp.recommender import Recommender


def parser() -> Parser:
    parser = rank_parser("export", __doc__ or "")
    parser.add_argument("--run", metavar="RUN_DIR", required=True, help="folder of a training run")
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="a folder under RUN_DIR/checkpoints; default: best, else the newest",
    )
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="folder to write; it must not exist"
    )
    parser.add_argument(
        "--trunk",
        choices=["torch_export"],
        help="add trunk.pt2, the trunk as a torch.export program (nothing here loads it)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    recommender = Recommender.load(arguments.run, arguments.checkpoint)
    with counting("exporting", "MB", per=1_000_000) as show:
        text = recommender.export(arguments.output, arguments.trunk, show)
    print(text)
