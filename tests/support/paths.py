"""Where the sources of this project are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# For processes that tests start: these sources before whatever else is on the path.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
