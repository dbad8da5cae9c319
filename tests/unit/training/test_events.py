"""TensorBoard events: what is written can be read again, and a failed write is one error and no
traceback of a thread."""

import subprocess
import sys
import time

import pytest

from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.training.events import EventFile

FULL_DISK = """
import resource, sys
from pathlib import Path
from dist_vasp.training.events import EventFile

events = EventFile(Path(sys.argv[1]), 0)
# the kernel refuses what goes beyond, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    for step in range(1, 2000):
        events.add("train", {"step": step, "loss": 0.5})
    events.close()
except OSError as error:
    print("refused:", error.strerror)
"""


def test_events_after_the_step_resumed_from_are_dropped(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        events = EventFile(tmp_path, after)
        for step in steps:
            events.add(
                "train",
                {"step": step, "epoch": 0, "loss": 10.0 * after + step, "note": "text is left out"},
            )
        events.close()
        time.sleep(1.01)  # files are read by name: the second, and a counter that is not padded
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
    ]


@pytest.mark.slow
def test_hyperparameters_and_test_metrics_are_there_to_compare_runs(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventFile(tmp_path, 0)
    result = {"test": {"ndcg@100": 0.25, "n_users": 3}, "validation": None}
    events.add_hparams(Config(model=ModelConfig(kind="flvae", hidden=24)), result)
    events.close()
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    found = {
        tag: HParamsPluginData.FromString(content)
        for tag, content in read.PluginTagToContent("hparams").items()
    }
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    assert values["model.kind"].string_value == "flvae"
    assert values["model.hidden"].number_value == 24
    metrics = found["_hparams_/experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["test/ndcg@100"]


def test_a_failed_write_reaches_the_caller_and_nobody_else(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "refused: File too large\n"
    assert "Traceback" not in done.stderr
