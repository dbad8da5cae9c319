"""A folder of wrong files beside right ones, for the invocations of docs/errors.md."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.invoke import Commands

SMALL = """\
data: {shards: shards, batch_size: 16, workers: 0}
model: {hidden: 8, latent: 4, encoder_layers: 2, decoder_layers: 2}
optimizer: {schedule: [{epochs: 1, lr: 0.001}]}
parallel: {lanes: 4}
run: {dir: new, max_steps: 3}
device: cpu
"""
COMPARISON = """\
shards: shards
reference: small
models:
  - {name: small, config: small.yaml}
  - {name: popularity, baseline: popularity}
"""

_TEXTS = {
    "empty.csv": "",
    "header.csv": "user,item,rating\n",
    "text-rating.csv": "user,item,rating\n1,2,5\n1,3,five\n",
    "nan-rating.csv": "user,item,rating\n1,2,5\n1,3,nan\n",
    "low-rating.csv": "user,item,rating\n1,2,1\n1,3,2\n",
    "other-columns.csv": "userId,movieId,rating\n1,2,5\n",
    "ragged.csv": "user,item,rating\n1,2,5\n1,3\n",
    "quote.csv": 'user,item,title\n1,2,nail\n1,3,"5 inch nail\n2,3,nail\n2,4,nail\n',
    "quotes.csv": 'user,item,title\n1,2,nail\n1,3,"5 inch nail\n2,3,nail\n2,4,"6 inch '
    "nail\n2,5,nail\n",
    "swallowed.csv": 'user,item,title\n1,2,nail\n1,3,"5 inch\n2,3,nail\n2,4,6 inch"\n',
    "nul.csv": b"user,item\n1,2\n1,\x003\n",
    "no-header.csv": "7,30,4\n7,10,3\n",
    "caret.csv": "user^item\n1^2\n",
    "no-users.csv": "user,item\nNULL,1\n2,\n",
    "sheet.csv": b"PK\x03\x04\x14\x00 and so on",
    "no-id.csv": "user,item\n1,2\n,3\n",
    "splits.csv": "user,item,split\n1,2,train\n1,3,eval\n",
    "few.csv": "user,item\n1,2\n1,3\n2,2\n",
    "latin.csv": b"user,item\n1,caf\xe9\n",
    "unpacked.csv.gz": "user,item\n1,2\n",
    "histories.csv": "user,item\nann,1\nann,2\nbob,3\n",
    "dislikes.csv": "user,item,rating\nann,1,2\nbob,3,1\n",
    "strangers.csv": "user,item\nann,90001\nbob,90002\n",
    "letters.csv": "user,item\nann,blue\nbob,red\n",
    "notes.txt": "not a table\n",
    "small.yaml": SMALL,
    "compare.yaml": COMPARISON,
    "compare-typo.yaml": COMPARISON.replace("reference", "referenz"),
    "compare-twice.yaml": COMPARISON + "reference: popularity\n",
    "duplicate.yaml": SMALL.replace("model: {hidden: 8,", "model: {hidden: 8, hidden: 16,"),
    "section-twice.yaml": SMALL + "model: {hidden: 16}\n",
    "typo.yaml": SMALL.replace("model:", "modle:"),
    "tabs.yaml": "data:\n\tshards: shards\n",
    "unclosed.yaml": "model: {hidden: 8\n",
    "list.yaml": "- model\n- data\n",
    "text.yaml": "just a sentence\n",
    "merge.yaml": "model: &m {hidden: 8}\nloss:\n  <<: *m\n",
    "laughs.yaml": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
    ),
    "endless.yaml": "model: &m {hidden: *m}\n",
    "deep.yaml": "model: " + "[" * 100 + "]" * 100 + "\n",
    "python.yaml": "model: !!python/object/apply:os.getcwd []\n",
    "nan.yaml": SMALL.replace("lr: 0.001", "lr: .nan"),
    "rates.json": '{"flops": "fast"}',
    "file": "a file where a folder is wanted\n",
}


def _odd_zips(folder: Path) -> None:
    """A zip that says it is encrypted, and one with a method of compression that is not known."""
    for name, inside, offset, value in (
        ("locked.zip", "locked.csv", 8, 1),
        ("odd-method.zip", "odd.csv", 10, 97),
    ):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(inside, "user,item\n1,2\n")
        data = bytearray((folder / name).read_bytes())
        data[data.index(b"PK\x01\x02") + offset] = value
        (folder / name).write_bytes(data)


def prepare(folder: Path, commands: Commands) -> None:
    """Fill `folder`; the right ones are made by the commands themselves."""
    for name, text in _TEXTS.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    _odd_zips(folder)
    (folder / "delta" / "_delta_log").mkdir(parents=True)
    (folder / "delta" / "part-0.csv").write_text("user,item\n1,2\n")
    random = np.random.default_rng(0)
    pairs = [(u, i) for u in range(120) for i in random.choice(40, 8, replace=False)]
    users, items = (pa.array(column) for column in zip(*pairs, strict=True))
    pq.write_table(pa.table({"user": users, "item": items}), folder / "interactions.parquet")
    pq.write_table(
        pa.table({"user": users, "item": items, "rating": pa.array([5] * len(pairs))}),
        folder / "rated.parquet",
    )
    whole = (folder / "interactions.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(
        pa.table({"user": users, "item": pa.array([i + 0.5 for _, i in pairs])}),
        folder / "floats.parquet",
    )
    pq.write_table(
        pa.table({"user": users.take(pa.array(range(64))), "item": items[:64]}),
        folder / "less.parquet",
    )
    commands.succeed(
        "python -m data_tools.shard interactions.parquet shards --val_users 10 "
        "--test_users 20 --users_per_shard 30",
        "python -m data_tools.shard interactions.parquet untested --val_users 0 --test_users 0",
        "python -m data_tools.shard interactions.parquet resharded --val_users 10 "
        "--test_users 20 --seed 1",
        "python -m data_tools.shard less.parquet other --min_items 1 --val_users 2 --test_users 2",
        "python launch/train.py --config small.yaml --run.dir run",
        "python launch/train.py --config small.yaml --run.dir flvae --model.kind flvae",
        "python -m data_tools.shard rated.parquet rated-shards --val_users 10 "
        "--test_users 20 --users_per_shard 30",
        "python launch/train.py --config small.yaml --data.shards rated-shards "
        "--run.dir rated --model.kind ease --model.ease_lambda 9",
        "python launch/export.py --run run --output export",
        "python -m data_tools.shard less.parquet gone --min_items 1 --val_users 2 --test_users 2",
        "python launch/train.py --config small.yaml --data.shards gone --run.dir elsewhere",
        "python launch/ensemble.py --members run flvae --output both",
    )
    shutil.rmtree(folder / "gone")
    (folder / "deep").mkdir()
    (folder / "deep" / "manifest.json").write_text("[" * 5000 + "]" * 5000)
    (folder / "many").mkdir()
    members = [{"run": "../run", "checkpoint": "", "weight": 1.0}] * 65
    ensemble = {"format_version": 1, "vocabulary_sha256": "v", "n_items": 1, "members": members}
    (folder / "many" / "ensemble.json").write_text(json.dumps(ensemble))
    shutil.copytree(
        folder / "run", folder / "untrained", ignore=shutil.ignore_patterns("checkpoints")
    )
    (folder / "taken").mkdir()
    (folder / "taken" / "diary.txt").write_text("mine\n")
    for name in ("run", "export"):
        shutil.copytree(folder / name, folder / f"damaged-{name}", symlinks=True)
    trunks = {
        path.resolve()
        for name in ("run", "export")
        for path in (folder / f"damaged-{name}").rglob("trunk.safetensors")
    }
    for trunk in trunks:
        data = bytearray(trunk.read_bytes())
        data[-1] ^= 1
        trunk.write_bytes(data)
    _not_ours(folder)
    shutil.copytree(folder / "shards", folder / "damaged-shards")
    (folder / "damaged-shards" / "train-000001.tar").unlink()
    shutil.copytree(folder / "shards", folder / "future-shards")
    manifest = json.loads((folder / "shards" / "manifest.json").read_text())
    (folder / "future-shards" / "manifest.json").write_text(
        json.dumps(manifest | {"format_version": 7})
    )


def _not_ours(folder: Path) -> None:
    """Files of somebody else where commands would write, and links."""
    for name in ("foreign", "own"):
        (folder / name).mkdir()
    for name in ("report.json", "benchmark.json", "ensemble.json"):
        (folder / "foreign" / name).write_text('{"mine": 1}\n')
    (folder / "own" / "config.yaml").write_text("mine: 1\n")
    (folder / "link.json").symlink_to("notes.txt")
    shutil.copytree(folder / "shards", folder / "spoilt-shards")
    (folder / "spoilt-shards" / "notes.txt").write_text("mine\n")
    shutil.copytree(folder / "run", folder / "linked-run", symlinks=True)
    (folder / "linked-run" / "metrics.jsonl").unlink()
    (folder / "linked-run" / "metrics.jsonl").symlink_to("../notes.txt")
