"""NEASE that starts from the closed form: against the dense oracle, on several ranks, from a run
and from the shards, resumed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import Config, DataConfig, ModelConfig, ParallelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model import ease
from dist_vasp.model.build import new_model
from dist_vasp.model.ease import scale_diagonal
from dist_vasp.ranking.load import load_model
from dist_vasp.training.closed_form import ease as fit_ease
from tests.faults.test_faults import tensors
from tests.oracles.dense import DenseVASP, dense_rows
from tests.oracles.rounding import UNIT, Bounded, bounded, each_within, stored, within
from tests.ranks import test_engine as engine
from tests.ranks.test_ease import (
    N_ITEMS,
    columns_of,
    dense,
    held_out,
    oracle,
    tastes,
    train_matrix,
    write_shards,
)
from tests.ranks.test_engine import LR, NOISE, REPORTED, STEPS, _batch, _rows, _state, _whole
from tests.support.invoke import succeeds
from tests.support.jobs import RunFolder, assert_same_run
from tests.support.make_shards import write_folder
from tests.support.partitioned import SMALL, dense_of, gathered, random_rows
from tests.support.ranks import run_ranks
from tests.support.sizes import sizes
from tests.unit.ranking.test_recommend import alone

W = "output.nease.weight"
OFFSET = -1.5


# --- the step -------------------------------------------------------------------------------------

# (model.nease, optimizer.nease_lr, optimizer.nease_decay, accumulation, clip_norm, kind)
CASES = [
    ("trained", 0.3, 2.0, 1, 0.0, "vasp"),
    ("trained", 0.3, 2.0, 3, 0.0, "vasp"),
    ("trained", 2.0, 0.0, 1, 0.05, "nease"),
    ("frozen", 1.0, 0.0, 1, 0.05, "vasp"),
    ("apart", 1.0, 0.0, 1, 0.0, "vasp"),
    ("apart", 1.0, 0.0, 2, 0.05, "vasp"),
]


def _config(
    nease: str, lr: float, decay: float, accumulation: int, clip: float, kind: str
) -> Config:
    model = ModelConfig(kind=kind, nease=nease, nease_offset=OFFSET, init_from_ease="x", **SMALL)
    config = engine._config(kind=kind, accumulation=accumulation, clip=clip)
    optimizer = dataclasses.replace(config.optimizer, nease_lr=lr, nease_decay=decay)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def _train(ranks, configs: list[Config]):
    """As test_engine, with W's start put beside W, and the scores at the end."""
    from dist_vasp.training.step.engine import Trainer

    found = []
    for config in configs:
        trainer = Trainer(config, engine.N_ITEMS, ranks)
        engine.randomise(trainer.model.slices(), 5)
        for matrix in trainer.model.matrices:
            for start, block in zip(matrix.start_slices(), matrix.columns(), strict=False):
                start.tensor.copy_(block)
        states = [_state(trainer)]
        reports = [
            dataclasses.astuple(trainer.step(_batch(step, ranks)))[:4] for step in range(STEPS)
        ]
        with trainer.evaluating() as trunk:
            x, _, _, _ = gathered(*_rows(9), engine.N_ITEMS, ranks)
            scores = [
                (lo, s[x.real_rows].numpy().copy()) for lo, s in trainer.model.scores(trunk, x)
            ]
        found.append({"states": [*states, _state(trainer)], "reports": reports, "scores": scores})
    return found


def _dense(parameters, case) -> dict[str, torch.Tensor | float]:
    """The oracle in double precision: `report K NAME` of step K, the last parameters, `log_p`."""
    nease, lr, decay, _, clip, kind = case
    model = DenseVASP(
        kind,
        parameters,
        SMALL["encoder_layers"],
        SMALL["decoder_layers"],
        True,
        OFFSET,
        apart=nease == "apart",
    )
    start = model.parameters[W].detach().clone()
    rest = [p for name, p in model.parameters.items() if name != W]
    groups = [{"params": rest, "lr": LR}] if rest else []
    if nease == "trained":
        groups.append({"params": [model.parameters[W]], "lr": lr * LR})
    optimizer = torch.optim.NAdam(groups, eps=1e-7, momentum_decay=4e-3)
    found: dict[str, torch.Tensor | float] = {}
    for step in range(STEPS):
        x, y = (dense_rows(rows, engine.N_ITEMS, torch.float64) for rows in _rows(step))
        reconstruction, kl = model.step(x, y, NOISE[step].double() if rest else None, "focal", None)
        if nease != "trained":
            model.gradients.pop(W, None)
            model.parameters[W].grad = None
        norm = float(
            torch.linalg.vector_norm(torch.cat([g.flatten() for g in model.gradients.values()]))
        )
        for p in model.parameters.values():
            if p.grad is not None:
                p.grad.mul_(min(1.0, clip / norm) if clip else 1.0)
        with torch.no_grad():
            model.parameters[W] += lr * LR * decay * (start - model.parameters[W])
        optimizer.step()
        numbers = (reconstruction + kl, reconstruction, kl, norm)
        found |= {f"report {step} {n}": v for n, v in zip(REPORTED, numbers, strict=True)}
    paths, _ = model.forward(dense_rows(_rows(9)[0], engine.N_ITEMS, torch.float64))
    log_p = sum(torch.nn.functional.logsigmoid(path) for path in paths)
    return found | {name: p.detach() for name, p in model.parameters.items()} | {"log_p": log_p}


_ORACLES: dict[tuple, Bounded] = {}


@pytest.mark.parametrize(
    ("world_size", "replicas"),
    [
        pytest.param(1, 1, marks=pytest.mark.slow),
        (2, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_dense_oracle(world_size, replicas):
    by_rank = run_ranks(_train, world_size, [_config(*case) for case in CASES], replicas=replicas)
    for c, case in enumerate(CASES):
        results = [rank[c] for rank in by_rank]
        before, after = (
            _whole([r["states"][k] for r in results[: world_size // replicas]]) for k in range(2)
        )
        parameters = {
            n: p for n, p in before.items() if not n.endswith((".exp_avg", ".exp_avg_sq", ".start"))
        }
        assert (f"{W}.start" in before) == bool(case[2])
        assert (f"{W}.exp_avg" in before) == (case[0] == "trained"), (
            "what is not trained needs no moments"
        )
        if case not in _ORACLES:
            _ORACLES[case] = bounded(
                lambda parameters=parameters, case=case: _dense(parameters, case)
            )
        oracle = _ORACLES[case]
        for r in results:
            for step, report in enumerate(r["reports"]):
                for name, value in zip(REPORTED, report, strict=True):
                    within(value, oracle, f"report {step} {name}", f"{case}")
            for lo, scores in (
                r["scores"] if replicas == 1 else ()
            ):  # a replica scores its own rows only
                J = slice(lo, lo + scores.shape[1])
                each_within(
                    scores, oracle.exact["log_p"][:, J], oracle.each["log_p"][:, J], f"{case} log p"
                )
        for name in parameters:
            within(after[name], oracle, name, f"{case}")
        if case[0] != "trained":
            assert torch.equal(after[W], before[W])
        elif case[2]:
            assert torch.equal(after[f"{W}.start"], before[W]) and not torch.equal(
                after[W], before[W]
            )


# --- the closed form with dropout -----------------------------------------------------------------


def test_the_diagonal_is_scaled():
    A = columns_of(alone(), 7, 3, torch.float64)
    for column in A.columns:
        column.fill_(2.0)
    scale_diagonal(A, 4.0)
    np.testing.assert_array_equal(torch.cat(A.columns, dim=1).numpy(), 2.0 + 6.0 * np.eye(7))


def edlae(share: float, value: float) -> np.ndarray:
    """B by the formula of the paper, with the dropout's share of the diagonal."""
    x = train_matrix()
    G = x.T @ x
    P = np.linalg.inv(G + share / (1 - share) * np.diag(np.diag(G)) + value * np.eye(len(G)))
    B = -P / np.diag(P)
    np.fill_diagonal(B, 0)
    return B


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("from_ease") / "shards")


def test_ease_with_weighted_users_is_the_formula(shards, tmp_path, call):
    from launch.train import main

    ease = [
        "--model.kind",
        "ease",
        "--model.ease_lambda",
        "5",
        "--model.ease_user_exponent",
        "-0.5",
        "--model.ease_dtype",
        "fp64",
    ]
    call(
        main,
        *ease,
        "--data.shards",
        str(shards),
        "--run.dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    )
    x = train_matrix()
    lengths = x.sum(axis=1, keepdims=True)
    expected = oracle(
        x * (lengths / lengths.mean()) ** -0.25, 5.0
    )  # both factors of x^T x hold half of the weight
    stored(weights_of(tmp_path / "run"), expected, "B with weighted users")
    assert np.abs(expected - oracle(x, 5.0)).max() > 1e-3


@pytest.fixture(scope="module")
def ease_run(shards, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("from_ease") / "ease"
    ease = [
        "--model.kind",
        "ease",
        "--model.ease_lambda",
        "5",
        "--model.ease_dropout",
        "0.25",
        "--model.ease_dtype",
        "fp64",
    ]
    succeeds(
        "train", *ease, "--data.shards", str(shards), "--run.dir", str(path), "--device", "cpu"
    )
    return path


def arguments(shards: Path, run_dir: Path, start: str | Path, *more: str) -> list[str]:
    data = [
        "--data.shards",
        str(shards),
        "--run.dir",
        str(run_dir),
        "--device",
        "cpu",
        "--data.batch_size",
        "100",
    ]
    start_from = [
        "--model.init_from_ease",
        str(start),
        "--model.nease_scale",
        "8",
        "--model.nease_offset",
        "-8",
    ]
    return [*data, *sizes(), *start_from, "--optimizer.schedule", "[{epochs: 2, lr: 0.01}]", *more]


CLOSED = ("--model.ease_lambda", "5", "--model.ease_dropout", "0.25", "--model.ease_dtype", "fp64")


def weights_of(run_dir: Path) -> torch.Tensor:
    return torch.cat(load_model(run_dir, None, alone()).model.model.matrices[0].columns(), dim=1)


def test_ease_with_dropout_is_the_formula(ease_run):
    stored(weights_of(ease_run), edlae(0.25, 5.0), "B with dropout")
    assert np.abs(edlae(0.25, 5.0) - oracle(train_matrix(), 5.0)).max() > 1e-3


@pytest.mark.parametrize(
    ("ranks", "start"),
    [
        (1, "closed_form"),
        pytest.param(2, "closed_form", marks=pytest.mark.slow),
        pytest.param(1, "run", marks=pytest.mark.slow),
        pytest.param(2, "run", marks=pytest.mark.slow),
    ],
)
def test_a_run_starts_from_b_and_keeps_it_where_it_is_apart(
    shards, ease_run, tmp_path, start, ranks
):
    more = ["--model.nease", "apart", *(CLOSED if start == "closed_form" else ())]
    named = start if start == "closed_form" else ease_run
    succeeds("train", *arguments(shards, tmp_path / "run", named, *more), ranks=ranks)
    stored(weights_of(tmp_path / "run"), 8 * edlae(0.25, 5.0), "8 B")


def test_a_run_that_stopped_goes_on_bitwise(shards, ease_run, tmp_path, call):
    """W, its start and its moments come back; the closed form is not asked for again."""
    from launch.train import main

    copy = shutil.copytree(ease_run, tmp_path / "ease", symlinks=True)
    more = (
        "--optimizer.nease_decay",
        "3",
        "--optimizer.nease_lr",
        "0.5",
        "--run.evaluate_every_epochs",
        "0",
    )
    whole, cut = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    call(main, *arguments(shards, whole.path, copy, *more))
    call(main, *arguments(shards, cut.path, copy, *more, "--run.max_steps", "3"))
    shutil.rmtree(copy)
    call(main, *arguments(shards, cut.path, copy, *more))
    assert_same_run(cut, whole)
    end = tensors(whole.newest())
    stored(end[f"{W}.start"], 8 * edlae(0.25, 5.0), "the start of W")
    assert 0 < (end[W] - end[f"{W}.start"]).abs().max() < 0.1


def test_what_cannot_work_is_refused(shards, ease_run, tmp_path, call):
    from launch.train import main

    call(main, *arguments(shards, tmp_path / "vasp", ease_run))
    with pytest.raises(
        ValueError,
        match=r"is a run of model\.kind vasp, expected ease; --init_from starts from others",
    ):
        call(main, *arguments(shards, tmp_path / "x", tmp_path / "vasp"))
    with pytest.raises(ValueError, match=r"nowhere holds no checkpoint"):
        call(main, *arguments(shards, tmp_path / "y", tmp_path / "nowhere"))
    write_folder(tmp_path / "other", tastes(50, 0), held_out(20, 1), n_items=N_ITEMS + 1)
    with pytest.raises(
        ValueError,
        match=r"was computed on 60 items .* data\.shards lists 61 .* compute ease on these shards",
    ):
        call(main, *arguments(tmp_path / "other", tmp_path / "z", ease_run))
    with pytest.raises(ValueError, match=r"W can start from one of them; leave one out"):
        call(main, *arguments(shards, tmp_path / "x", ease_run), "--init_from", "y")


@pytest.mark.parametrize(
    ("section", "keys", "expected"),
    [
        (
            "model",
            {"init_from_ease": "closed_form"},
            r"model\.ease_lambda is 0\.0, expected more than 0 with model\.init_from_ease",
        ),
        (
            "model",
            {"init_from_ease": "x", "kind": "flvae"},
            r"model\.init_from_ease is 'x', expected nothing with model\.kind flvae",
        ),
        ("model", {"nease": "frozen"}, r"model\.nease is 'frozen', expected trained, unless"),
        (
            "model",
            {"nease": "apart", "kind": "nease", "init_from_ease": "x"},
            r"model\.nease is 'apart', expected trained, unless",
        ),
        (
            "model",
            {"nease_scale": 8.0},
            r"model\.nease_scale is 8\.0, expected 1 without model\.init_from_ease",
        ),
        (
            "model",
            {"ease_user_exponent": 5.0},
            r"model\.ease_user_exponent is 5\.0, expected -4 to 4; 0 weighs all users the same",
        ),
        ("model", {"ease_dropout": 1.0}, r"model\.ease_dropout is 1\.0, expected 0 <= share < 1"),
        ("model", {"ease_xi": 1.5}, r"model\.ease_xi is 1\.5, expected 0 to 1; 0 gives EASE"),
        (
            "model",
            {"ease_item_exponent": -5.0},
            r"model\.ease_item_exponent is -5\.0, expected -4 to 4; 0 treats popular and rare",
        ),
        (
            "model",
            {"ease_lambda_exponent": 5.0},
            r"model\.ease_lambda_exponent is 5\.0, expected -4 to 4",
        ),
        (
            "optimizer",
            {"nease_decay": 1.0},
            r"optimizer\.nease_decay is 1\.0, expected 0 without model\.init_from_ease",
        ),
        ("optimizer", {"nease_lr": -1.0}, r"optimizer\.nease_lr is -1\.0, expected 0 or more"),
    ],
)
def test_impossible_keys_are_named(section, keys, expected):
    with pytest.raises(ValueError, match=expected):
        from_dict({section: keys})


# --- what is done with the model ------------------------------------------------------------------


def test_lists_and_explanations_know_the_offset(shards, ease_run, tmp_path, call):
    """Mapped and loaded, before and after an export: p = p_flvae * sigmoid(W x + offset), whatever
    the loss was taken of."""
    from dist_vasp import Recommender
    from launch.recommend import main as recommend
    from launch.train import main

    path = tmp_path / "run"
    call(main, *arguments(shards, path, ease_run, "--model.nease", "apart"))
    seen = [3, 4, 40]
    ids = [1000 + i for i in seen]
    shallow = dense([seen], N_ITEMS)[0] @ (8 * edlae(0.25, 5.0)) - 8
    loaded = load_model(path, None, alone())
    model, trunk = loaded.model.model, loaded.model.trunk
    oracle, x = (
        dense_of(model, trunk, loaded.config.model),
        torch.from_numpy(dense([seen], N_ITEMS)),
    )
    exact = bounded(lambda: oracle.factors(x))
    np.testing.assert_allclose(
        exact.exact["logit"], shallow, rtol=0, atol=8 * 3 * UNIT
    )  # 8 B, stored
    ours = Recommender.load(path)
    ours.export(tmp_path / "export")
    for r in (ours, Recommender.load(tmp_path / "export")):
        found, scores = r.recommend([ids], k=5)
        for item, score in zip(found[0].tolist(), scores[0].tolist(), strict=True):
            why = r.explain(ids, item)
            total = sum(reason.weight for reason in why.reasons) + why.rest
            for name, values in (
                ("p", [why.p, score, why.p_flvae * why.p_nease]),
                ("p_nease", why.p_nease),
                ("p_flvae", why.p_flvae),
                ("logit", [why.logit - 8, total - 8]),  # the offset is beside it
            ):
                place = item - 1000
                each_within(values, exact.exact[name][place], exact.each[name][place], name)
    (tmp_path / "h.csv").write_text("user,item\n" + "".join(f"ann,{i}\n" for i in ids))
    out = tmp_path / "l.jsonl"
    call(
        recommend,
        "--run",
        path,
        "--histories",
        tmp_path / "h.csv",
        "--k",
        5,
        "--output",
        out,
        "--device",
        "cpu",
        "--explain",
        2,
    )
    line = json.loads(out.read_text().splitlines()[0])
    text = json.dumps(line)
    assert str(found[0][0]) in text


def _closed_form_start(ranks, shards: Path) -> list[np.ndarray]:
    """This rank's columns of W, started from the closed form."""
    from dist_vasp.training.closed_form.ease import start_from_ease
    from dist_vasp.training.step.engine import Trainer

    manifest = Manifest.load(shards)
    model = ModelConfig(kind="nease", init_from_ease="closed_form", ease_lambda=5.0)
    config = Config(data=DataConfig(shards=str(shards)), model=model, device="cpu")
    trainer = Trainer(config, manifest.n_items, ranks)
    start_from_ease(trainer, manifest)
    return [columns.numpy() for columns in trainer.model.matrices[0].columns()]


def test_a_closed_form_start_where_no_rank_has_a_whole_block(tmp_path):
    """Two ranks own 30 and 31 items, fewer than a block has."""
    random = np.random.default_rng(2)
    rows = [sorted(random.choice(61, size=6, replace=False).tolist()) for _ in range(90)]
    write_folder(tmp_path / "shards", rows, n_items=61)
    whole = np.concatenate(_closed_form_start(alone(), tmp_path / "shards"), axis=1)
    by_rank = run_ranks(_closed_form_start, 2, tmp_path / "shards")
    parts = np.concatenate([columns for own in by_rank for columns in own], axis=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_a_start_beside_the_models_blocks_is_the_same(tmp_path, monkeypatch):
    """As on a GPU, whose blocks are wide and padded: B is computed in blocks of its own."""
    rows = random_rows(40, 23, 1)
    write_folder(tmp_path, train=rows, n_items=23)
    manifest, ranks = Manifest.load(tmp_path), alone()
    model = ModelConfig(kind="nease", init_from_ease="closed_form", ease_lambda=5.0)
    config = Config(data=DataConfig(shards=str(tmp_path)), model=model, device="cpu")
    config = dataclasses.replace(config, parallel=ParallelConfig(block_columns=5))
    monkeypatch.setattr(ease, "SWEEP_COLUMNS", 7)
    pieces = new_model(config, 23, ranks).matrices[0].slices()
    fit_ease._fit_beside(pieces, config, manifest, ranks)
    columns = [torch.zeros(23, hi - lo) for lo, hi in ranks.partition_of_items(23).blocks(7)]
    fit_ease.fit(columns, 7, config, manifest, ranks)
    found = torch.cat([piece.tensor for piece in pieces], dim=1)
    assert torch.equal(found, torch.cat(columns, dim=1)) and found.any()
