"""Everything that a rank or a training needs, imported once by the process that ranks are forked
from.

No import here may start a thread: a fork has only the thread that forked.
"""

import importlib

import deepspeed  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.stats  # noqa: F401
import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401
from deepspeed.runtime.zero.muon import original_muon  # noqa: F401 - with the first optimizer

import dist_vasp.recommender  # noqa: F401
from tests.support.paths import ROOT

for folder in ("launch", "data_tools"):
    for path in (ROOT / folder).glob("*.py"):
        importlib.import_module(f"{folder}.{path.stem}")
