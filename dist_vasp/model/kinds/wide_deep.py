"""Wide & Deep on interactions: FLVAE and NEASE joined by OR (Cheng et al. 2016, arXiv 1606.07792).

    score(x) = sigmoid((R d + r) + (Q z + q) + W x),  diag(W) = 0

One sigmoid of the sum of all paths: an item is listed where one path is sure of it. VASP's product
(kinds/vasp.py) lists an item where all paths agree; its authors argue for that (arXiv 2102.05774,
section 3.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_vasp.model.kinds.vasp import Vasp
from dist_vasp.model.links import Sum
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.slices import Storage

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config


class WideDeep(Vasp):
    name = "wide_deep"

    def parts(self, config: Config, storage: Storage) -> Parts:
        vasp = super().parts(config, storage)
        return Parts(storage, vasp.input, vasp.paths, Sum())
