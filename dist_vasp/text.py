"""Text that came from outside (ids, titles, file names, messages of other processes), made safe to
print."""

from __future__ import annotations

import html
import re

# Control characters (C0, C1, DEL), line and paragraph separators, and what changes the direction of
# text. Not \n, not \t.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    """`text` with every control character as its escape sequence; line feeds and tabs stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """`text` for a page of HTML."""
    return html.escape(printable(text))


def one_line(text: str) -> str:
    """`text` for one line of a terminal or a table: no line breaks, no control characters."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )
