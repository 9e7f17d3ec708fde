"""Calibration statistics: one sum of squares per input feature of every site. They add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError
from mfcompile.graph import Diagnostic


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration saw at the input of one site.

    Attributes:
        sum_of_squares: (in_features,) float64, sum over all counted tokens of the squared input.
        token_count: rows that were counted; padding is not.
        padding_count: rows that were left out because a padding mask covers them.
        sample_count: batch rows (samples, not tokens) that passed through the site.
    """

    sum_of_squares: Tensor
    token_count: int
    padding_count: int
    sample_count: int

    def input_norm(self) -> Tensor:
        """(in_features,) float64 L2 norm of each input feature over all counted tokens (the ||a|| of Eq. 4 and 5)."""
        return self.sum_of_squares.sqrt()


@dataclass(frozen=True)
class CalibrationStatistics:
    """Statistics of every site, from any number of batches.

    Attributes:
        sites: site name -> its statistics.
        batch_count: batches that were run; the example inputs, where they stand in, count as one.
        source: where the batches came from, in words ("calibration batches", "example inputs").
        observed_by: how the activations were observed ("graph", "module").
        padding_masks: names of the padding masks that were applied.
        diagnostics: where padding was decided by a weaker rule, or could not be left out.
    """

    sites: Mapping[str, SiteStatistics]
    batch_count: int
    source: str
    observed_by: str
    padding_masks: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Statistics of both sets of batches together.

        Raises:
            CalibrationError: the two cover different sites.
        """
        if set(self.sites) != set(other.sites):
            odd = sorted(set(self.sites) ^ set(other.sites))
            raise CalibrationError(f"statistics of different sites cannot be added; only one side has {odd[0]}")
        merged = {
            name: SiteStatistics(
                own.sum_of_squares + other.sites[name].sum_of_squares,
                own.token_count + other.sites[name].token_count,
                own.padding_count + other.sites[name].padding_count,
                own.sample_count + other.sites[name].sample_count,
            )
            for name, own in self.sites.items()
        }
        return replace(
            self,
            sites=merged,
            batch_count=self.batch_count + other.batch_count,
            source=" and ".join(dict.fromkeys((self.source, other.source))),
            observed_by="+".join(sorted({*self.observed_by.split("+"), *other.observed_by.split("+")})),
            padding_masks=tuple(dict.fromkeys((*self.padding_masks, *other.padding_masks))),
            diagnostics=tuple(dict.fromkeys((*self.diagnostics, *other.diagnostics))),
        )

    def check(self) -> None:
        """Refuse statistics that cannot rank weights.

        Raises:
            CalibrationError: a sum is NaN or infinite (names the site and the feature).
        """
        for name, site in self.sites.items():
            finite = torch.isfinite(site.sum_of_squares)
            if not bool(finite.all()):
                feature = int((~finite).nonzero()[0])
                raise CalibrationError(
                    f"the input of {name} holds NaN or infinity in feature {feature} "
                    f"({int((~finite).sum())} of {finite.numel()} features): its norm cannot rank weights. "
                    f"Check the calibration data and the checkpoint"
                )
