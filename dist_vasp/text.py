"""Make text from outside safe to print: ids, titles, file names, messages of other processes."""

from __future__ import annotations

import html
import re

# Control characters (C0, C1, DEL) except \n and \t, line and paragraph separators, and characters
# that change the direction of text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """Return `text` with control characters as escape sequences; line feeds and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """Return `text` for a page of HTML."""
    return html.escape(printable(text))


def one_line(text: str) -> str:
    """Return `text` as one line without control characters, for a terminal or a table."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )
