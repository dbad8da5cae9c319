"""Tests, and every process that they start, compute with one thread unless OMP_NUM_THREADS says
otherwise: results are then the same bits wherever they are computed, and two workers of pytest do
not compete for two cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
