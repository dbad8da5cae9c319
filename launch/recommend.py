"""Top-N lists for histories: deepspeed [launcher flags] launch/recommend.py --run RUN_DIR --histories FILE --k 20 --output FILE"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_vasp.parallel.comm import agreed, init_ranks
from dist_vasp.ranking.evaluate import model_scorer
from dist_vasp.ranking.load import load_model
from dist_vasp.ranking.recommend import check_output, read_histories, recommend_to_file
from dist_vasp.training.progress import Progress
from launch.cli import make_argument_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_argument_parser("recommend.py", __doc__ or "")
    parser.add_argument("--run", metavar="RUN_DIR", required=True, help="folder of a training run")
    parser.add_argument("--checkpoint", metavar="NAME", help="a folder under RUN_DIR/checkpoints; default: best, else the newest")
    parser.add_argument(
        "--histories", metavar="FILE", required=True, help="CSV(.gz) or Parquet with columns user, item (original ids)"
    )
    parser.add_argument("--k", type=int, default=20, help="items per user (default 20)")
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="CSV or Parquet: user, rank, item, score (ease: x B, else p)"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N users with their histories and lists")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_args(argv)
    if arguments.k < 1:
        raise ValueError(f"--k is {arguments.k}, expected at least 1")
    check_output(arguments.output, arguments.overwrite)

    ranks = init_ranks(device=arguments.device, interface=arguments.interface)
    loaded = load_model(arguments.run, arguments.checkpoint, ranks)
    with agreed(ranks):
        histories = read_histories(arguments.histories, loaded.items)
    progress = Progress("recommending", histories.n_users, "user", show=ranks.is_main)
    scorer = model_scorer(loaded.model, loaded.trunk)
    as_probability = np.asarray if loaded.config.model.kind == "ease" else np.exp  # EASE's x B is no logarithm of one
    report = recommend_to_file(
        scorer, histories, loaded.items, arguments.k, arguments.output, ranks, progress.update, arguments.show, as_probability
    )
    progress.close()
    if ranks.is_main:
        print(report)


if __name__ == "__main__":
    run(main)
