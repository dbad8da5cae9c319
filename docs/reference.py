"""Generate reference pages from the source, which is parsed and never imported.

`configuration` reads the dataclasses of dist_vasp/config.py; `python` reads the docstrings of
dist_vasp/ranking/recommender.py. `python -m docs.reference configuration` prints a page.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_SECTIONS = {
    "DataConfig": "data",
    "ModelConfig": "model",
    "LossConfig": "loss",
    "OptimizerConfig": "optimizer",
    "ParallelConfig": "parallel",
    "RunConfig": "run",
}
_TYPES = {
    "int": "whole number",
    "float": "number",
    "str": "text",
    "bool": "true, false",
    "bool | None": "true, false, null",
}


def configuration() -> str:
    """Return a table of keys for every section, in the order of config.py."""
    classes = {
        node.name: node
        for node in _tree("dist_vasp/config.py").body
        if isinstance(node, ast.ClassDef)
    }
    unknown = [n for n in classes if n.endswith("Config") and n not in (*_SECTIONS, "Config")]
    assert not unknown, f"docs/reference.py does not know the section of {unknown}"
    parts = []
    for name, section in _SECTIONS.items():
        title = (ast.get_docstring(classes[name]) or "").partition(": ")[2]
        parts += [
            f"## {section}",
            "",
            title[:1].upper() + title[1:],
            "",
            *_table(classes[name], f"{section}."),
            "",
        ]
    stages = _table(classes["Stage"], "")
    alone = [row for row in _table(classes["Config"], "") if row.startswith("| `device`")]
    return "\n".join(
        [
            *parts,
            "## A stage of optimizer.schedule",
            "",
            *stages,
            "",
            "## device",
            "",
            *stages[:2],
            *alone,
        ]
    )


def _table(node: ast.ClassDef, prefix: str) -> list[str]:
    """Return Markdown rows for the fields of a dataclass; a field's docstring is below it."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field, text in zip(node.body, node.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
            continue
        assert isinstance(text.value, ast.Constant)
        kind, value = ast.unparse(field.annotation), _default(field.value)
        choices = re.fullmatch(r"Literal\[(.*)\]", kind)
        words = (
            choices[1].replace("'", "")
            if choices
            else _TYPES.get(kind, "list of {epochs, lr}" if "Stage" in kind else kind)
        )
        meaning = " ".join(str(text.value.value).split()).replace("|", "\\|")
        rows.append(f"| `{prefix}{ast.unparse(field.target)}` | {words} | {value} | {meaning} |")
    return rows


def _default(node: ast.expr | None) -> str:
    if node is None:
        return "required"
    text = ast.unparse(node)
    stages = re.findall(r"Stage\((.*?), (.*?)\)", text)
    if stages:
        return "`[" + ", ".join(f"{{epochs: {epochs}, lr: {lr}}}" for epochs, lr in stages) + "]`"
    plain = {"''": "empty", "None": "`null`", "True": "`true`", "False": "`false`"}
    return plain.get(text, "`" + text.strip("'") + "`")


def python() -> str:
    """Return the signatures and docstrings of Recommender and of the types that it returns."""
    parts = []
    for node in _tree("dist_vasp/ranking/recommender.py").body:
        if not isinstance(node, ast.ClassDef):
            continue
        parts += [f"## {node.name}", "", _text(node), ""]
        fields = [
            f
            for f in node.body
            if isinstance(f, ast.AnnAssign) and not ast.unparse(f.target).startswith("_")
        ]
        if fields:
            parts += ["```python", *(ast.unparse(f) for f in fields), "```", ""]
        for method in node.body:
            if (
                isinstance(method, ast.FunctionDef)
                and not method.name.startswith("_")
                and ast.get_docstring(method)
            ):
                parts += [
                    f"### {node.name}.{method.name}",
                    "",
                    "```python",
                    _signature(method),
                    "```",
                    "",
                    _text(method),
                    "",
                ]
    return "\n".join(parts)


def _signature(node: ast.FunctionDef) -> str:
    marks = [ast.unparse(d) for d in node.decorator_list]
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self")
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in marks:
        return f"{node.name}{returns.replace(' ->', ':')}"
    return f"{node.name}({arguments}){returns}"


def _text(node: ast.ClassDef | ast.FunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


if __name__ == "__main__":
    print({"configuration": configuration, "python": python}[sys.argv[1]]())
