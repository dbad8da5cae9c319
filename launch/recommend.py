"""Top-N lists for histories: deepspeed [launcher flags] launch/recommend.py --run RUN_DIR --histories FILE --k 20 --output FILE"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from dist_vasp.parallel.comm import agreed, init_ranks
from dist_vasp.ranking.ensemble import load_ranker
from dist_vasp.ranking.explain import model_explainer
from dist_vasp.ranking.history_file import open_histories
from dist_vasp.ranking.recommend import recommend_to_file
from dist_vasp.ranking.writers import check_output
from dist_vasp.training.progress import Progress
from launch.cli import make_argument_parser, run


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_argument_parser("recommend.py", __doc__ or "")
    parser.add_argument("--run", metavar="DIR", required=True, help="folder of a training run, an export, or an ensemble")
    parser.add_argument("--checkpoint", metavar="NAME", help="a folder under RUN_DIR/checkpoints; default: best, else the newest")
    parser.add_argument(
        "--histories", metavar="FILE", required=True, help="CSV(.gz) or Parquet with columns user, item (original ids)"
    )
    parser.add_argument("--k", type=int, default=20, help="items per user (default 20)")
    parser.add_argument("--output", metavar="FILE", required=True, help=".csv, .parquet or .jsonl: user, rank, item, score")
    parser.add_argument(
        "--explain", type=int, default=0, metavar="N", help="add the paths' factors of the score and the N past items that add most"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N users with their histories and lists")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
    arguments = parser.parse_args(argv)
    if arguments.k < 1:
        raise ValueError(f"--k is {arguments.k}, expected at least 1")
    if arguments.explain < 0:
        raise ValueError(f"--explain is {arguments.explain}, expected 0 or more past items")
    if arguments.show < 0:
        raise ValueError(f"--show is {arguments.show}, expected 0 or more users")
    inputs = [("--histories", arguments.histories)]
    check_output(arguments.output, arguments.overwrite, inputs)

    ranks = init_ranks(device=arguments.device, interface=arguments.interface, shared=arguments.run)
    ranker = load_ranker(arguments.run, arguments.checkpoint, ranks)
    loaded = ranker.alone
    with ExitStack() as stack:
        with agreed(ranks):
            if arguments.explain and loaded is None:
                raise ValueError(f"--explain takes the paths of one model, and {arguments.run} is an ensemble; leave it out")
            if arguments.explain and not ranker.config.model.shallow:
                raise ValueError("--explain needs the shallow path, which model.kind flvae does not have; leave it out")
            histories = stack.enter_context(open_histories(arguments.histories, Path(arguments.output).parent))
        progress, start = Progress("recommending", histories.n_users, "user", show=ranks.is_main), time.monotonic()
        report = recommend_to_file(
            ranker.scorer(),
            histories,
            ranker.items,
            min(arguments.k, len(ranker.items.keys)),
            arguments.output,
            ranks,
            lambda done: progress.update(done, f"{done / (time.monotonic() - start):,.0f} users/s"),
            arguments.show,
            np.exp if ranker.probabilities else np.asarray,
            arguments.explain,
            model_explainer(loaded.model, loaded.trunk, ranks) if loaded else None,
            overwrite=arguments.overwrite,
            inputs=inputs,
        )
    progress.close()
    if ranks.is_main:
        print(report)


if __name__ == "__main__":
    run(main)
