"""The file of a comparison, for tests."""

from __future__ import annotations

from pathlib import Path

import yaml


def written(tmp_path: Path, **changes) -> Path:
    """A compare file; a change to None leaves the key out."""
    raw = {
        "shards": "data",
        "reference": "a",
        "seeds": [0, 1],
        "models": [{"name": "a", "config": {"model": {"kind": "nease"}}}],
    }
    raw = {key: value for key, value in {**raw, **changes}.items() if value is not None}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
