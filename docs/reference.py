"""Generate reference pages from the source, which is parsed and never imported.

`configuration` reads the dataclasses of dist_vasp/config.py and of the kinds of model; `python`
reads the docstrings of dist_vasp/ranking/recommender.py and lists.py.
`python -m docs.reference configuration` prints a page.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_KINDS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "dist_vasp/model/kinds").glob("[!_]*.py")
)
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
    """Return a table of keys for every section, in the order of config.py.

    The kinds of model add keys to two sections: those are the fields of the base classes.
    """
    classes = _classes("dist_vasp/config.py")
    for path in ("dist_vasp/model/registry.py", *_KINDS):
        classes |= _classes(path)
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
            *_table(_with_bases(classes[name], classes), f"{section}."),
            "",
        ]
    stages = _table(classes["Stage"].body, "")
    alone = [row for row in _table(classes["Config"].body, "") if row.startswith("| `device`")]
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


def _classes(path: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(path).body if isinstance(node, ast.ClassDef)}


def _kind_names() -> list[str]:
    """Return the values of `model.kind`, in the order of the registry."""
    names = {}
    for path in _KINDS:
        for node in _classes(path).values():
            for line in node.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name":
                    names[node.name] = ast.literal_eval(line.value)
    registered = re.findall(r"^    (\w+)\(\),", _text_of("dist_vasp/model/registry.py"), re.M)
    return [names[name] for name in registered]


def _with_bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.stmt]:
    """Return the statements of a class and of its bases, in the order of its dataclass fields."""
    body: list[ast.stmt] = []
    for base in reversed(node.bases):
        body += _with_bases(classes[ast.unparse(base)], classes)
    return body + node.body


def _table(body: list[ast.stmt], prefix: str) -> list[str]:
    """Return Markdown rows for the fields of a dataclass; a field's docstring is below it."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field, text in pairwise(body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(text, ast.Expr):
            continue
        assert isinstance(text.value, ast.Constant)
        kind, value = ast.unparse(field.annotation), _default(field.value)
        kind = kind.replace("tuple(KINDS)", ", ".join(_kind_names()))
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
    classes = _classes("dist_vasp/ranking/recommender.py") | _classes("dist_vasp/ranking/lists.py")
    for node in classes.values():
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


def _text_of(path: str) -> str:
    return (ROOT / path).read_text()


def _tree(path: str) -> ast.Module:
    return ast.parse(_text_of(path))


if __name__ == "__main__":
    print({"configuration": configuration, "python": python}[sys.argv[1]]())
