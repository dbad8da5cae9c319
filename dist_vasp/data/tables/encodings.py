"""Convert text of any encoding to UTF-8 bytes without a byte order mark.

An encoding is named by the user or by its mark, never guessed.
"""

from __future__ import annotations

import codecs
from typing import Any

from dist_vasp.data.tables.streams import foreign

_MARKS = {  # the longer ones first: UTF-32 begins with the mark of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LARGEST_HEAD = 32
# encodings of host names and of program text
_NO_FILES = {"idna", "punycode", "unicode_escape", "raw_unicode_escape"}


def check_encoding(name: str) -> str:
    """Return Python's name of a text encoding; ValueError where there is none."""
    try:
        known = codecs.lookup(name)
        "".encode(name)
    except (LookupError, UnicodeError, ValueError):
        known = None
    if (
        known is None
        or not getattr(known, "_is_text_encoding", True)
        or known.name.replace("-", "_") in _NO_FILES
    ):
        raise ValueError(
            f"--encoding {name!r} is not known; name one such as utf-8, utf-16, latin-1, cp1252 "
            "or cp932"
        )
    return known.name


class Utf8:
    """Reads a stream of any encoding as UTF-8 bytes; ValueError for bytes that are not valid.

    UTF-8 input is not checked here: the reader of the rows checks it and names the row.
    """

    def __init__(self, stream: Any, encoding: str | None, where: str) -> None:
        self._stream = stream
        self._where = where
        head = self._head()
        problem = foreign(head)
        if problem:
            raise ValueError(f"{where} is {problem}")
        mark, marked = next(
            ((m, name) for m, name in _MARKS.items() if head.startswith(m)), (b"", None)
        )
        wanted = codecs.lookup(encoding).name if encoding else None
        if marked and wanted and not wanted.startswith(marked) and wanted != "utf-8-sig":
            raise ValueError(
                f"{where} begins with the mark of {marked}, but --encoding is {wanted}; leave "
                "--encoding out"
            )
        self.encoding = wanted or marked or "utf-8"
        if self.encoding in ("utf-8", "utf-8-sig"):
            self._decoder = None
            self._held = head.removeprefix(codecs.BOM_UTF8)
        else:
            self._decoder = codecs.getincrementaldecoder(self.encoding)()
            self._held = (
                head.removeprefix(mark) if wanted and wanted[-3:] in ("-le", "-be") else head
            )
        self._ended = False
        self._n_bytes = 0

    def _head(self) -> bytes:
        head = b""
        while len(head) < _LARGEST_HEAD and (more := self._stream.read(_LARGEST_HEAD - len(head))):
            head += more
        return head

    def read(self, size: int) -> bytes:
        """Return some bytes, b"" at the end."""
        while not self._ended:
            data = self._held + self._stream.read(size)
            self._held = b""
            self._ended = not data
            if self._decoder is None:
                return data
            try:
                text = self._decoder.decode(data, final=self._ended)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self._where}: the bytes after {self._n_bytes + error.start:,} are not "
                    f"{self.encoding} ({error.reason}); "
                    "name the right --encoding"
                ) from None
            self._n_bytes += len(data)
            if text:
                return text.encode("utf-8", "strict")
        return b""


def explain_bytes(block: bytes, error: UnicodeDecodeError) -> str:
    """Return the error message for bytes that are not UTF-8."""
    byte = block[error.start : error.start + 1]
    return (
        f"the byte 0x{byte.hex()} is not UTF-8 text; the file may be cp1252 (Windows) or latin-1: "
        "name its encoding with --encoding cp1252, or save it as UTF-8"
    )
