"""What a kind of model has to say about itself. One file for each under model/kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.earlier import EarlierEncoder
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.slices import Storage
from dist_vasp.model.step import WHOLE, Phase
from dist_vasp.model.trunk import Trunk

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class ClosedForm:
    """What is said of a kind that is computed instead of trained.

    keys: those of `model` that decide the result. what: the computation, in a few words. walked:
    the key whose values a search tries from large to small until validation gets worse; "" where
    every combination is tried.
    """

    keys: tuple[str, ...]
    what: str
    walked: str = ""


class Kind(ABC):
    """One value of `model.kind`.

    losses: the values of `loss.kind` that it takes; none matters to a closed form.
    halves: whether each user's items are split into halves that predict each other by default.
    reads_ratings: whether it can be trained on ratings (`data.ratings`).
    closed_form: how it is computed from the interactions; None where it is trained in steps.
    size_keys: keys of `model` that decide the shapes of its weights.
    """

    name: ClassVar[str]
    losses: ClassVar[tuple[str, ...]]
    halves: ClassVar[bool] = True
    reads_ratings: ClassVar[bool] = False
    closed_form: ClassVar[ClosedForm | None] = None
    size_keys: ClassVar[tuple[str, ...]] = ()

    def check(self, config: Config) -> None:
        """Raise ValueError for keys that make no sense with this kind."""

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk | None:
        """The replicated layers between input side and heads, None where there are none."""
        return None

    def phases(self, model: ModelConfig) -> tuple[tuple[int, Phase], ...]:
        """What epochs train: (number of epochs, phase), repeated without end (turns.py). The whole
        model, unless a kind says less."""
        return ((1, WHOLE),)

    def earlier(self, config: Config, storage: Storage) -> EarlierEncoder | None:
        """The encoder before the present phase, for a prior that reads it; None for the others."""
        return None

    @abstractmethod
    def parts(self, config: Config, storage: Storage) -> Parts:
        """Input side, paths and link over `storage`."""
