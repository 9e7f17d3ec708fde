"""Random pruning: what every other criterion has to beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mfcompile.passes.criteria.base import Criterion, SiteData


@dataclass(frozen=True)
class Random(Criterion):
    """Standard normal scores from one stream of random numbers, layer by layer, one threshold over all layers.

    Sparsities of layers fluctuate a little, since it is the scores of all of them that are compared.
    """

    name: ClassVar[str] = "random"
    _states: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin(self, sites: Iterable[SiteData], seed: int) -> None:
        """Note where in the stream every site begins, so that its scores can be drawn again instead of being kept."""
        generator = torch.Generator().manual_seed(seed)
        self._states.clear()
        for site in sites:
            self._states[site.name] = generator.get_state()
            _draw(site, generator)

    def score(self, site: SiteData) -> Tensor:
        """(out_features, in_features) standard normal."""
        generator = torch.Generator()
        generator.set_state(self._states[site.name])
        return _draw(site, generator)


def _draw(site: SiteData, generator: torch.Generator) -> Tensor:
    """The next numbers of the stream, whatever torch's default dtype and device are."""
    return torch.randn(tuple(site.weight.shape), generator=generator, dtype=torch.float32, device="cpu")
