"""What a kind of model is, only model/kinds and the registry know.

Nothing else compares `model.kind` with a name, or asks a model for flags such as deep or linear.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dist_vasp.config.checks import check
from dist_vasp.config.schema import Config, LossConfig, ModelConfig, OptimizerConfig
from dist_vasp.model.build import make_trunk, measure_size
from dist_vasp.model.registry import KINDS, ModelKeys, OptimizerKeys, kind_of
from tests.support.paths import ROOT

FLAGS = {"deep", "shallow", "linear", "trains_nease", "is_linear", "is_deep", "is_shallow"}
FILES = [
    path
    for top in ("dist_vasp", "launch", "data_tools")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "kinds" not in path.parts and path.name != "registry.py"
]


def branches(tree: ast.AST) -> list[str]:
    """Every comparison with the name of a kind, and every flag that is asked for."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            named = set(KINDS) & {value for value in constants if isinstance(value, str)}
            asked = any(ast.unparse(n).endswith("model.kind") for n in ast.walk(node))
            if named or asked:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr in FLAGS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.MatchValue) and ast.unparse(node.value).strip("'") in KINDS:
            found.append(f"line {node.value.lineno}: case {ast.unparse(node.value)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(Path(path).relative_to(ROOT)))
def test_no_branch_on_a_kind(path):
    assert not branches(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "if config.model.kind == 'ease': pass",
        "if config.model.kind in CLOSED_FORM: pass",
        "x = 1 if kind in ('vasp', 'flvae') else 2",
        "if model.linear: pass",
        "match kind:\n    case 'nease': pass",
    ],
)
def test_a_branch_would_be_seen(source):
    assert branches(ast.parse(source))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_accepts_its_losses_and_counts_its_parameters(name):
    kind = kind_of(name)
    assert kind.name == name and (kind.losses or kind.closed_form)
    for loss in kind.losses or ("focal",):
        model = ModelConfig(kind=name, hidden=8, latent=4, encoder_layers=2, decoder_layers=2)
        config = check(Config(model=model, loss=LossConfig(kind=loss)))
        size = measure_size(config, 20)
        assert size.items > 0 and (size.trunk > 0) == bool(kind.size_keys) == (
            make_trunk(model) is not None
        )


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].losses])
def test_every_kind_refuses_the_losses_of_others(name):
    others = {loss for kind in KINDS.values() for loss in kind.losses} - set(kind_of(name).losses)
    for loss in others:
        with pytest.raises(ValueError, match=f"loss.kind is '{loss}', expected one of"):
            check(Config(model=ModelConfig(kind=name), loss=LossConfig(kind=loss)))


def test_keys_of_the_matrix_are_refused_without_one():
    start = ModelConfig(kind="flvae", init_from_ease="runs/ease")
    with pytest.raises(ValueError, match=r"model\.init_from_ease .* nothing with model.kind flvae"):
        check(Config(model=start))
    decay = OptimizerConfig(nease_decay=0.5)
    with pytest.raises(ValueError, match=r"optimizer\.nease_decay is 0\.5, expected 0 without"):
        check(Config(optimizer=decay))


def test_no_two_kinds_add_one_key():
    for keys in (ModelKeys, OptimizerKeys):
        own = [set(base.__annotations__) for base in keys.__bases__]
        assert sum(map(len, own)) == len(set().union(*own)), keys
        assert all("check" in vars(base) for base in keys.__bases__), keys
