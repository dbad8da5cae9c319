"""Start Spark, or take the session that is there, and tell its failures in one line."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_vasp.text import one_line

_ROWS_PER_BATCH = 1 << 16


@contextmanager
def session(master: str | None) -> Iterator[Any]:
    """Yield a SparkSession, which ends with the block unless it was there before.

    master: the address of the cluster; None: what spark-submit or Spark's configuration says.
    ValueError where pyspark or Java is missing, or the cluster cannot be reached.
    """
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        raise ValueError(
            "--engine spark needs pyspark, which is not installed here; run pip install "
            '"dist-vasp[spark]", or pass --engine local'
        ) from None
    # the functions that are used here do not depend on it
    warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
    before = SparkSession.getActiveSession()
    if before is None:
        _check_java()
    on_interrupt = signal.getsignal(signal.SIGINT)
    # Spark starts python3 otherwise; spark-submit has set it from spark.pyspark.python
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("data_tools.shard")
    builder = builder.config("spark.ui.showConsoleProgress", "false")
    if master is not None and before is None:
        builder = builder.master(master)
    try:
        spark = builder.getOrCreate()
    except Exception as error:
        where = f" --master {master}" if master else ""
        raise ValueError(f"--engine spark{where}: Spark does not start ({cause(error)})") from None
    try:
        if before is None:
            signal.signal(signal.SIGINT, on_interrupt)  # pyspark replaces it
            spark.sparkContext.setLogLevel("ERROR")
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", _ROWS_PER_BATCH)
        yield spark
    finally:
        if before is None:
            spark.stop()


def _check_java() -> None:
    home = os.environ.get("JAVA_HOME")
    running = "PYSPARK_GATEWAY_PORT" in os.environ  # started by spark-submit
    if not running and shutil.which("java", path=f"{home}/bin" if home else None) is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "no java is on the PATH"
        raise ValueError(
            f"--engine spark needs Java 17 or later, and {where}; install it (Debian: apt-get "
            "install openjdk-17-jre-headless), or pass --engine local"
        )


def cause(error: BaseException) -> str:
    """Return one line on what went wrong in Spark: of a Python task, the last of its traceback."""
    java = getattr(error, "java_exception", None)
    text = str(error)
    if java is not None:
        while java.getCause() is not None:
            java = java.getCause()
        text = str(java.getMessage())
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    calls = [i for i, line in enumerate(lines) if line.startswith("at ")]  # of Java
    lines = lines[: calls[0]] if calls and calls[0] else lines
    is_traceback = any(line.startswith("Traceback") for line in lines)
    named = lines[-1 if is_traceback else 0] if lines else type(error).__name__
    return one_line(named)[:500]


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Tell what Spark begins to do; a failure of it is one line and ends the command with 1.

    The text of a Spark failure is that of its first cause.
    """
    print(f"spark: {what}", flush=True)
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("py4j", "pyspark"):
            raise
        raise ChildProcessError(f"Spark failed while {what} ({cause(error)})") from error
