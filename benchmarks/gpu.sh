#!/usr/bin/env bash
# Measures everything that docs/gpu.md asks of one GPU, in 8 minutes, and prints one table.
#
#   [WHEELS=DIR] [PYTHON=python3] benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
# WHEELS: a folder of wheels for what torch's image lacks (docs/gpu.md lists them). They are
# installed without their dependencies into a virtual environment that sees the image's torch.
# --small rehearses all of it on a CPU in a few minutes; its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
if [ -n "${WHEELS:-}" ]; then
    environment=$(mktemp -d)/venv
    "$python" -m venv --system-site-packages "$environment"
    python=$environment/bin/python
    "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmarks.gpu "$@"
