"""The options for the format of a table's files, the same for every command that reads one."""

from __future__ import annotations

import argparse

from dist_vasp.data.ids import MISSING
from dist_vasp.data.tables.columns import Reading
from dist_vasp.data.tables.csv_header import check_delimiter
from dist_vasp.data.tables.encodings import check_encoding


def add_reading_options(parser: argparse.ArgumentParser) -> list[str]:
    """Add the options, and return their names."""
    before = set(parser._option_string_actions)
    add = parser.add_argument
    add(
        "--delimiter",
        metavar="D",
        help="separator of the cells of a CSV: one character, tab, space or ::; "
        "default: detected in the header",
    )
    add(
        "--encoding",
        metavar="E",
        help="of a CSV: utf-16, latin-1, cp1252, ...; default UTF-8, or by the byte order mark",
    )
    add(
        "--no_header",
        action="store_true",
        help="CSV: the first line is data; columns are named 1, 2, ...",
    )
    add("--no_quoting", action="store_true", help="CSV: a quote is a character like any other")
    add(
        "--missing",
        metavar="TEXTS",
        help=f"ids that stand for a missing one, separated by commas; default {','.join(MISSING)}",
    )
    return sorted(set(parser._option_string_actions) - before)


def reading_of(arguments: argparse.Namespace, missing: tuple[str, ...] = MISSING) -> Reading:
    """Return the values of the options; ValueError for an invalid value.

    `missing`: the default of --missing.
    """
    if arguments.missing is not None:
        missing = tuple(text for text in arguments.missing.split(",") if text)
    return Reading(
        delimiter=None if arguments.delimiter is None else check_delimiter(arguments.delimiter),
        encoding=None if arguments.encoding is None else check_encoding(arguments.encoding),
        header=not arguments.no_header,
        quoting=not arguments.no_quoting,
        missing=missing,
    )
