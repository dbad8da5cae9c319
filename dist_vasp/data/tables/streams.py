"""Open files as streams of unpacked bytes: gzip, zstd, bzip2, xz, and members of a zip.

Nothing is extracted to disk. Compressed files cannot exhaust memory or time: there are limits on
the directory of a zip, on the dictionary of an xz file, and on the ratio of unpacked to packed
bytes.
"""

from __future__ import annotations

import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
MAX_DIRECTORY_BYTES = 64 << 20  # of a zip: some 500,000 members
MAX_RATIO = 1000  # of unpacked to packed bytes
FREE_BYTES = 1 << 30  # unpacked bytes for which there is no limit
_XZ_MEMORY = 256 << 20
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2}
_FOREIGN = {
    b"\x1f\x8b": "gzip data; add .gz to its name",
    b"PK\x03\x04": (
        "a zip archive; add .zip to its name, or export the sheet as CSV if it is a workbook"
    ),
    b"\x28\xb5\x2f\xfd": "zstd data; add .zst to its name",
    b"BZh9": "bzip2 data; add .bz2 to its name",
    b"\xfd7zXZ": "xz data; add .xz to its name",
    b"PAR1": "a Parquet file; pass --format parquet or name it .parquet",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; export the sheet as CSV",
    b"ARROW1": "an Arrow file; write it as Parquet",
    b"ORC": "an ORC file; write it as Parquet",
    b'{"': "JSON; write it as CSV or Parquet",
    b"[{": "JSON; write it as CSV or Parquet",
    b"<!DOCTYPE": "an HTML page; fetch the file itself",
    b"<html": "an HTML page; fetch the file itself",
    b"Obj\x01": "an Avro file; write it as Parquet",
    b"version https://git-lfs": (
        "a pointer of Git LFS, not the file itself; fetch that with git lfs pull"
    ),
}


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn the errors of libraries about a damaged or foreign file into a ValueError."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            f"{where} is compressed in a way that cannot be read ({error}); compress it with "
            "deflate"
        ) from None
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist; name a file or folder") from None
    except PermissionError:
        raise ValueError(
            f"{where} may not be read by this user (permission denied); change its permissions"
        ) from None
    except (
        pa.ArrowException,
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        tarfile.TarError,
        struct.error,
    ) as error:
        text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        hint = ""
        if re.search("incorrect header check|unknown compression method", text):
            hint = (
                "; it is not compressed with gzip, or something follows the data: correct its "
                "name, or compress it again"
            )
        elif "magic bytes" in text:
            hint = (
                "; it is cut off, damaged, or no Parquet file: fetch it again, or correct its name"
            )
        elif re.search(
            "runcated|ended before|unexpected end|CRC|data check|orrupt|thrift|smaller than|is 0 "
            "bytes",
            text,
        ):
            hint = "; the file is cut off or damaged, fetch it again"
        elif re.search(
            "not a zip file|not a bzip2|format not supported by decoder|nknown frame", text
        ):
            hint = "; it is not what its name says, correct the name"
        raise ValueError(f"{where} cannot be read: {text}{hint}") from None


def unpacked_name(name: str) -> str:
    """Return the name without a suffix of compression: ratings.csv for ratings.csv.gz."""
    return next((name[: -len(suffix)] for suffix in PACKED if name.lower().endswith(suffix)), name)


def open_file(path: Path) -> Any:
    """Return the unpacked bytes of a file, as an object with `read` and `close`."""
    raw = open(path, "rb")  # noqa: SIM115  the caller closes what is returned
    return _unpacked(path.name, raw, path.stat().st_size, str(path))


def open_member(path: Path, member: str) -> Any:
    """Return the unpacked bytes of a zip member; ValueError for encryption and unknown methods."""
    where = f"{path}, {member}"
    archive = open_zip(path)
    info = archive.getinfo(member)
    if info.flag_bits & 1:
        raise ValueError(f"{where} is encrypted; unpack it with its password first")
    if info.compress_type not in _METHODS:
        raise ValueError(
            f"{where} is compressed with method {info.compress_type}; unpack it first, or "
            "compress with deflate"
        )
    stream = archive.open(info)
    archive.close()  # the file stays open until the member is closed
    return _unpacked(
        member, Bounded(stream, info.compress_size, where), max(info.compress_size, 1), where
    )


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip archive; ValueError where its directory is too large."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - (1 << 16) - 98))
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at >= 0:
        (claimed,) = struct.unpack_from("<I", tail, at + 12)
        wide = tail.rfind(b"PK\x06\x06", 0, at)
        if claimed == 0xFFFFFFFF and wide >= 0:
            (claimed,) = struct.unpack_from("<Q", tail, wide + 40)
        if claimed > MAX_DIRECTORY_BYTES:
            raise ValueError(
                f"{path} says that its directory of members has {claimed:,} bytes, at most "
                f"{MAX_DIRECTORY_BYTES:,} are read; "
                "put the tables into a folder"
            )
    return zipfile.ZipFile(path)


class Bounded:
    """A stream that raises ValueError when it unpacks to far more than `packed` bytes should."""

    def __init__(self, stream: Any, packed: int, where: str) -> None:
        self._stream = stream
        self._where = where
        self._left = max(FREE_BYTES, MAX_RATIO * packed)
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._where} unpacks to more than {MAX_RATIO:,} times its size; unpack it "
                "first if that is what you expect"
            )
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._stream.close()


class _Xz:
    """An xz file, with a limit on the dictionary size that the file declares."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decoder = self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        while True:
            data = b""
            if self._decoder.eof:
                data = self._decoder.unused_data or self._raw.read(1 << 16)
                if not data.strip(b"\0"):
                    return b""
                self._decoder = self._new()
            elif self._decoder.needs_input:
                data = self._raw.read(1 << 16)
                if not data:
                    raise EOFError(
                        "the compressed data ended before the end of the stream was reached"
                    )
            if out := self._decoder.decompress(data, size):
                return out

    def close(self) -> None:
        self._raw.close()


def _unpacked(name: str, raw: Any, packed: int, where: str) -> Any:
    kind = next((kind for suffix, kind in PACKED.items() if name.lower().endswith(suffix)), None)
    if kind is None:
        return raw
    if kind == "xz":
        return Bounded(_Xz(raw), packed, where)
    return Bounded(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), kind), packed, where)


def foreign(head: bytes) -> str | None:
    """Return what a file is, by its first bytes, and how to fix it; None where it may be text."""
    return next((problem for magic, problem in _FOREIGN.items() if head.startswith(magic)), None)
