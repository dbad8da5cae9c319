"""List the configurations that come with the package, copy one of them, or write the one that
trains the best model of a run again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from dist_vasp.command_line import Parser
from dist_vasp.config.shipped import shipped_configs
from dist_vasp.files import new_file


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    shipped = shipped_configs()
    name = (arguments.name or "").removesuffix(".yaml")
    if not name:
        width = max(map(len, shipped))
        for stem, path in shipped.items():
            print(f"{stem:<{width}}  {_purpose(path.read_text())}")
        return
    if name in shipped:
        text, what = shipped[name].read_text(), f"a copy of {shipped[name]}"
    elif Path(arguments.name).is_dir():
        text, what = _of_run(arguments.name)
    else:
        raise ValueError(
            f"{arguments.name} is neither a configuration nor the folder of a run; "
            "`dist-vasp configs` lists the configurations"
        )
    if not arguments.output:
        sys.stdout.write(text)
        return
    with new_file(arguments.output, "--output", overwrite=False) as file:
        file.write(text.encode())
    print(f"{arguments.output}: {what}")


def parser() -> Parser:
    parser = Parser(prog="dist-vasp configs", description=__doc__)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="the configuration to print or copy, or the folder of a run, for the keys and epochs "
        "of its best model; default: list",
    )
    parser.add_argument("--output", metavar="FILE", help="write it to this file")
    return parser


def _of_run(run: str) -> tuple[str, str]:
    """Return the text of a configuration, and what it is."""
    from dist_vasp.checkpoint import folder as folders  # it imports torch, which takes seconds
    from dist_vasp.training.again import settled

    opened = folders.open_found(Path(run) / "checkpoints")
    opened.close()
    config, name = settled(opened.header), opened.path.name
    what = f"the model of {run}, checkpoint {name}, with nothing left to choose"
    raw = asdict(config)
    del raw["data"]["shards"], raw["data"]["auxiliary"], raw["run"]["dir"]
    text = yaml.safe_dump(raw, sort_keys=False)
    more = ", --data.auxiliary" if config.model.ease_auxiliary else ""
    passed = f"Pass --data.shards{more} and --run.dir."
    return f"# {what[0].upper()}{what[1:]}.\n# {passed}\n{text}", what


def _purpose(text: str) -> str:
    """Return the words of the comment `# Purpose:` of a configuration."""
    words: list[str] = []
    for line in text.splitlines():
        head, colon, rest = line.removeprefix("# ").partition(":")
        if colon and head == "Purpose":
            words.append(rest.strip())
        elif words and line.startswith("#   "):
            words.append(line.removeprefix("#").strip())
        elif words:
            break
    return " ".join(words).rstrip(".")
