"""A configuration from YAML and the command line, read by jsonargparse.

`parse` is the one way in. It raises ValueError with a message that names the key, what was
received, what was expected and how to fix it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from dist_vasp.command_line import renamed
from dist_vasp.config.checks import check
from dist_vasp.config.parser_errors import readable
from dist_vasp.config.schema import SECTIONS, Config
from dist_vasp.config.shipped import find_config
from dist_vasp.config.yaml_file import read_yaml
from dist_vasp.help_text import HelpAll, short_help
from dist_vasp.require import require

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_OTHER_NAMES = {"--shards": "--data.shards", "--run": "--run.dir"}  # as in other commands
_MORE = (
    "--shards DIR and --run DIR are the keys data.shards and run.dir. Every key of a configuration "
    "is an option, too, such as --model.hidden 64; `--help-all` lists them."
)
_LONGEST_WORD = 100  # of a choice or a number that is given as text


class _ConfigFile(ActionConfigFile):
    """`--config FILE`, looked through before it is taken."""

    def __call__(
        self, parser: Any, namespace: Any, value: Any, option_string: str | None = None
    ) -> None:
        try:
            value = str(find_config(value))
            raw = read_yaml(value, "the sections of a configuration, such as configs/demo.yaml")
            if not isinstance(raw, dict):
                raise ValueError(
                    f"{value} holds {raw!r:.40}, expected sections with keys, such as "
                    "configs/demo.yaml"
                )
        except ValueError as error:
            raise _FileError(str(error)) from None
        super().__call__(parser, namespace, value, option_string)


class _FileError(ValueError):
    """A mistake in a configuration file that already reads well."""


class ConfigParser(ArgumentParser):
    """A parser with `--config FILE` and keys; `--help` leaves the keys out, `--help-all` shows
    them."""

    def whole_help(self) -> str:
        """Return the help with every option and key."""
        return super().format_help()

    def format_help(self, *_: Any) -> str:
        return short_help(self, _Keys(), _MORE)


class _Keys:
    """Contains the `dest` of what --help leaves out: keys, and options about them."""

    def __contains__(self, dest: object) -> bool:
        return isinstance(dest, str) and ("." in dest or dest in (*SECTIONS, "print_config"))


def make_parser(prog: str, description: str) -> ConfigParser:
    """A parser with `--config FILE` and one `--section.key` for every field of Config; add further
    arguments to it."""
    parser = ConfigParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=_ConfigFile,
        metavar="FILE",
        help="YAML file of keys, or the name of one that `dist-vasp configs` lists; "
        "options win over it",
    )
    parser.add_class_arguments(Config, None)
    parser.add_argument("--help-all", action=HelpAll, help="show every key and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # the deepspeed launcher adds this one
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None = None) -> tuple[Config, Any]:
    """(checked Config, all parsed arguments); ValueError in one readable sentence for anything that
    does not fit."""
    words = renamed(sys.argv[1:] if argv is None else argv, _other_names(parser))
    try:
        namespace = parser.parse_args(words)
        _require_sections(namespace)
        made = parser.instantiate(namespace)
    except _FileError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # jsonargparse raises ArgumentError; yaml and others what they like
        raise ValueError(readable(str(error))) from None
    config = Config(**{f.name: getattr(made, f.name) for f in fields(Config)})
    return check(config), namespace


def _other_names(parser: ArgumentParser) -> dict[str, str]:
    """Return keys by their names in other commands, unless `parser` has such an option itself."""
    own = {action.dest for action in parser._actions} - set(SECTIONS)
    return {option: key for option, key in _OTHER_NAMES.items() if option[2:] not in own}


def from_dict(raw: dict[str, Any]) -> Config:
    """The Config that `dataclasses.asdict` took apart; ValueError where it does not fit this
    version."""
    _refuse_text(raw)
    parser = _parser_of_dicts()
    try:
        namespace = parser.parse_object(copy.deepcopy(raw))  # it writes into what it is given
        _require_sections(namespace)
        made = parser.instantiate(namespace)
    except Exception as error:
        raise ValueError(readable(str(error))) from None
    return check(Config(**{f.name: getattr(made, f.name) for f in fields(Config)}))


@cache
def _parser_of_dicts() -> ConfigParser:
    """Making a parser takes as long as reading a configuration with it."""
    return make_parser("config", "configuration")


def _refuse_text(raw: dict[str, Any]) -> None:
    """ValueError where text stands for a list or a table: the parser would read it as YAML, aliases
    and all."""
    for section in fields(Config):
        values, maker = raw.get(section.name), section.default_factory
        types: dict[str, Any] = (
            {f.name: f.type for f in fields(maker)} if isinstance(maker, type) else {}
        )  # type: ignore[arg-type]
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and len(value) > _LONGEST_WORD and types.get(name) != "str":
                raise ValueError(
                    f"{section.name}.{name:.40} is a text of {len(value):,} characters, expected "
                    f"{types.get(name)}"
                )


def _require_sections(namespace: Any) -> None:
    for section in SECTIONS:
        value = getattr(namespace, section)
        require(
            isinstance(value, Namespace),
            section,
            value,
            "a section of keys",
            f"write `{section}:` with its keys indented below",
        )


def load(path: str | Path) -> Config:
    """The Config in a YAML file."""
    return parse(make_parser("config", "configuration file"), ["--config", str(path)])[0]
