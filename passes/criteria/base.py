"""What a pruner is: something that chooses masks; most do so by a score per weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

if TYPE_CHECKING:
    from mfcompile.masks import MaskSet
    from mfcompile.passes.pieces import Values
    from mfcompile.passes.pruning_run import PruningRun
    from mfcompile.passes.sparsity_patterns import Pattern


class Need(StrEnum):
    """What a pruner cannot do without."""

    STATISTICS = "statistics"
    """Calibration statistics: forward passes only."""
    GRADIENTS = "gradients"
    """A loss and batches: forward and backward passes."""


@dataclass(frozen=True)
class SiteData:
    """What a criterion may look at to score one site (one linear layer, an expert, a range of output rows).

    Attributes:
        name: the site; the FQN of its weight, with an index where it is a part of it.
        region: the region that the site lies in.
        weight: (out_features, in_features), any float dtype, often a view of the model's own: never write into it.
        input_norm: (in_features,) float64 L2 norm of every input feature over all calibration tokens; None for criteria
            that need no statistics.
        token_count: calibration tokens that the site saw.
        sample_count: calibration samples that they belong to.
        gradient: (out_features, in_features) mean gradient of the loss over the batches; None for criteria that need none.
    """

    name: str
    region: str
    weight: Tensor
    input_norm: Tensor | None = None
    token_count: int = 0
    sample_count: int = 0
    gradient: Tensor | None = None


class Pruner(ABC):
    """Chooses the weights that stay. Options are fields of a frozen dataclass.

    Attributes:
        name: what users call it.
        needs: what it cannot do without.
        allocation: the allocation that it was published with, used where the user names none.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    allocation: ClassVar[str] = "score-global"

    def check_pattern(self, pattern: Pattern) -> None:  # noqa: B027 - most pruners refuse none
        """Refuse a pattern in which the pruner cannot choose, before anything is run; most can choose in any.

        Raises:
            InputError: names the pattern that will do.
        """

    @abstractmethod
    def choose(self, run: PruningRun) -> MaskSet:
        """The masks, with new values of kept weights where the pruner changes them."""


class Criterion(Pruner):
    """A pruner that scores every weight; allocation and pattern are then free to choose.

    A criterion of one's own is a subclass with a ``name``, its ``needs`` and ``score``: see docs/criteria.md.
    """

    def begin(self, sites: Iterable[SiteData], seed: int) -> None:
        """Look at all sites before any is scored; most criteria have no reason to.

        Args:
            sites: every site, in ``named_parameters`` order; made one by one while they are iterated over.
            seed: of the run.
        """

    @abstractmethod
    def score(self, site: SiteData) -> Tensor:
        """(out_features, in_features) float32, finite, any sign: the smallest are removed first.

        Called several times for a site, and must give the same each time.
        """

    def values(self, site: SiteData) -> Values | None:
        """The numbers of ``score``, computed piece by piece where they are read, or None: a faster way to the same masks.

        Not asked of a class that inherits it and has a ``score`` of its own. Called in threads.
        """
        return None

    def scale(self, site: SiteData) -> float:
        """A positive factor that makes scores of different sites comparable, for allocations by score."""
        return 1.0

    def choose(self, run: PruningRun) -> MaskSet:
        """The best scores stay, as many as the allocation gives a site, in the shape of the pattern."""
        if Need.GRADIENTS not in self.needs:
            return run.select(self)
        found = run.gradients()
        masks = run.select(self, gradients=found.gradients)
        return replace(masks, diagnostics=(*masks.diagnostics, *found.diagnostics))
