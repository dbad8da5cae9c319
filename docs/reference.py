"""Generate reference pages from the source, which is parsed and never imported.

`configuration` reads the dataclasses of dist_vasp/config/schema.py and of the kinds of model;
`python` reads the docstrings of dist_vasp/recommender.py and ranking/lists.py.
`python -m docs.reference configuration` prints a page.
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
    "SearchConfig": "search",
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
    """Return a table of keys for every section, in the order of the configuration."""
    classes = _classes()
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
            *_table(_fields(classes, name), f"{section}."),
            "",
        ]
    stages = _table(_fields(classes, "Stage"), "")
    alone = [row for row in _table(_fields(classes, "Config"), "") if row.startswith("| `device`")]
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


def _classes() -> dict[str, ast.ClassDef]:
    """Return the classes of the configuration, by name: shared ones and those of the kinds."""
    kinds = sorted((ROOT / "dist_vasp" / "model" / "kinds").glob("*.py"))
    paths = ["dist_vasp/config/schema.py", "dist_vasp/model/registry.py"]
    paths += [str(path.relative_to(ROOT)) for path in kinds]
    nodes = [node for path in paths for node in _tree(path).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _fields(classes: dict[str, ast.ClassDef], name: str) -> list[tuple[ast.AnnAssign, ast.Expr]]:
    """Return the fields of a dataclass with their docstrings, those of its bases first."""
    node, fields = classes[name], []
    for base in reversed(node.bases):
        fields += _fields(classes, ast.unparse(base))
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            fields.append((field, text))
    return fields


def _names_of_kinds() -> str:
    """Return the values of model.kind, in the order of the registry."""
    registry, classes = _tree("dist_vasp/model/registry.py"), _classes()
    (kinds,) = [n.value for n in registry.body if isinstance(n, ast.AnnAssign) and n.value]
    assert isinstance(kinds, ast.Tuple)
    made = [ast.unparse(kind).removesuffix("()") for kind in kinds.elts]
    assigned = [n for kind in made for n in classes[kind].body if isinstance(n, ast.Assign)]
    named = [n.value for n in assigned if ast.unparse(n.targets[0]) == "name"]
    return ", ".join(ast.unparse(value).strip("'") for value in named)


def _table(fields: list[tuple[ast.AnnAssign, ast.Expr]], prefix: str) -> list[str]:
    """Return Markdown rows for the fields of a dataclass."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field, text in fields:
        assert isinstance(text.value, ast.Constant)
        kind, value = ast.unparse(field.annotation), _default(field.value)
        choices = re.fullmatch(r"Literal\[(.*)\]", kind)
        words = (
            _names_of_kinds()
            if kind == "Literal[tuple(KINDS)]"
            else choices[1].replace("'", "")
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
    files = ("recommender", "ranking/lists")
    nodes = [node for file in files for node in _tree(f"dist_vasp/{file}.py").body]
    for node in nodes:
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
