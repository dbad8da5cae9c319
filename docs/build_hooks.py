"""What `mkdocs build` makes out of the code: configuration.md from the dataclasses, python.md from
the docstrings.

Both files are in the folder only as an opening text with a marker; the rest is written at build
time, so it cannot be stale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from docs.reference import configuration, python  # noqa: E402

_MADE = {"configuration.md": configuration, "python.md": python}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    made = _MADE.get(page.file.src_uri)
    return markdown.replace("<!-- generated -->", made()) if made else markdown
