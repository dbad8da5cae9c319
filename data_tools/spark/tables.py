"""`--format table`: export tables that Spark knows to files, which are read like others."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_tools.engine import Engine
from data_tools.spark.engine import SparkEngine
from data_tools.spark.session import cause, stage


@contextmanager
def tables_as_files(args: argparse.Namespace, engine: Engine) -> Iterator[argparse.Namespace]:
    """Yield the options with Parquet files in place of the tables; they go with the block.

    ValueError for a table that Spark does not know.
    """
    assert isinstance(engine, SparkEngine)
    beside = engine.scratch_beside(args.output)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=beside) as scratch:
        inputs = []
        for number, name in enumerate(args.inputs):
            folder = Path(scratch, f"{number}")
            folder.mkdir()
            inputs.append(str(_export(name, folder, engine)))
        yield argparse.Namespace(**vars(args) | {"inputs": inputs, "format": "parquet"})


def _export(name: str, parent: Path, engine: SparkEngine) -> Path:
    spark = engine.started(parent)
    try:
        frame = spark.table(name)
    except Exception as error:
        if type(error).__name__ not in ("AnalysisException", "ParseException"):
            raise
        raise ValueError(
            f"--format table: Spark has no table {name} ({cause(error)}); name one of its "
            "catalogue, or leave --format out for files"
        ) from None
    folder = parent / (re.sub(r"[^\w.-]", "_", name).lstrip("._") or "table")
    with stage(f"exporting the table {name}"):
        frame.write.parquet(f"file://{folder}")
    for path in [*folder.glob(".*"), *folder.glob("_*")]:  # checksums and marks of Hadoop
        path.unlink()
    return folder
