"""What a check has found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """`level` error: a job would fail or give nothing; warning: it would run, but slowly or not for
    long."""

    check: str
    level: Level
    text: str
    do: str = ""  # empty where it is ok


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def warning(check: str, text: str, do: str) -> Finding:
    return Finding(check, "warning", text, do)


def error(check: str, text: str, do: str) -> Finding:
    return Finding(check, "error", text, do)


def table(findings: list[Finding]) -> str:
    """Return one line a finding, with what to do below it, and the verdict at the end."""
    wide = max((len(f.check) for f in findings), default=0)
    lines = []
    for f in findings:
        lines.append(f"{f.level:<8} {f.check:<{wide}}  {f.text}")
        if f.do:
            lines.append(f"{'':<8} {'':<{wide}}  -> {f.do}")
    n_errors, n_warnings = (
        sum(f.level == level for f in findings) for level in ("error", "warning")
    )
    verdict = f"{_count(n_errors, 'error')}, {_count(n_warnings, 'warning')}"
    lines.append(
        f"{verdict}: "
        + ("fix the errors before a job is submitted" if n_errors else "a job can be submitted")
    )
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n or 'no'} {what}{'' if n == 1 else 's'}"
