"""List the configurations that come with the package, or copy one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
    if name not in shipped:
        raise ValueError(f"{name} is not a configuration; `dist-vasp configs` lists them")
    text = shipped[name].read_text()
    if not arguments.output:
        sys.stdout.write(text)
        return
    with new_file(arguments.output, "--output", overwrite=False) as file:
        file.write(text.encode())
    print(f"{arguments.output}: a copy of {shipped[name]}")


def parser() -> Parser:
    parser = Parser(prog="dist-vasp configs", description=__doc__)
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="the configuration to print or copy; default: list"
    )
    parser.add_argument("--output", metavar="FILE", help="write the copy to this file")
    return parser


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
