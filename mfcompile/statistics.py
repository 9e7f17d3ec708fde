"""Calibration statistics: one sum of squares per input feature of every site. They add up, and are kept in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import Diagnostic
from mfcompile.region import PruneSite


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration saw at the input of one site.

    Attributes:
        sum_of_squares: (in_features,) float64, sum over all counted tokens of the squared input.
        token_count: rows that were counted; padding is not.
        padding_count: rows that were left out because a padding mask covers them.
        sample_count: batch rows (samples, not tokens) that passed through the site.
        weighting: "none": ``input_norm`` is the plain norm; "cip": it is weighted by token importance; "uniform": calibration
            weighed other sites, no attention has the tokens of this one, and its plain norm is put to the scale of theirs.
        norm_sum: (in_features,) float64, sum over samples of the weighted norm of each; None where not weighted.
        norm_count: samples of which ``norm_sum`` is the sum: those with a token that counts.
    """

    sum_of_squares: Tensor
    token_count: int
    padding_count: int
    sample_count: int
    weighting: str = "none"
    norm_sum: Tensor | None = None
    norm_count: int = 0

    def input_norm(self) -> Tensor:
        """(in_features,) float64 norm of each input feature.

        Plain: the L2 norm over all counted tokens, the ||a|| of Eq. 4 and 5 of MULTIFLOW. Weighted: the mean over samples of
        (sum_n w_n x_n^2)^(1/2), Eq. 4 of CoMP. Uniform: the root of the mean square over all counted tokens, which ranks
        features as the plain norm does.
        """
        if self.norm_sum is not None:
            return self.norm_sum / max(self.norm_count, 1)
        if self.weighting == "uniform":
            return (self.sum_of_squares / max(self.token_count, 1)).sqrt()
        return self.sum_of_squares.sqrt()

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """Of the samples of both, weighted alike."""
        both = self.norm_sum is not None and other.norm_sum is not None
        return SiteStatistics(
            self.sum_of_squares + other.sum_of_squares,
            self.token_count + other.token_count,
            self.padding_count + other.padding_count,
            self.sample_count + other.sample_count,
            self.weighting,
            self.norm_sum + other.norm_sum if both else None,  # type: ignore[operator]  # both looked
            self.norm_count + other.norm_count,
        )


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
        fingerprint: fingerprint of the model that was calibrated ("" when unknown).
        weighting: how tokens were weighed, "none" or "cip".
    """

    sites: Mapping[str, SiteStatistics]
    batch_count: int
    source: str
    observed_by: str
    padding_masks: tuple[str, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    fingerprint: str = ""
    weighting: str = "none"

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """Statistics of both sets of batches together.

        Raises:
            CalibrationError: the two cover different sites, or are known to be of different models.
        """
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise CalibrationError(
                f"statistics of different models cannot be added: one is of fingerprint {self.fingerprint[:16]}..., the other "
                f"of {other.fingerprint[:16]}.... Calibrate one model on all of the data"
            )
        if set(self.sites) != set(other.sites):
            odd = sorted(set(self.sites) ^ set(other.sites))
            raise CalibrationError(f"statistics of different sites cannot be added; only one side has {odd[0]}")
        weightings = {name: (own.weighting, other.sites[name].weighting) for name, own in self.sites.items()}
        for name, (mine, theirs) in {"all": (self.weighting, other.weighting), **weightings}.items():
            if mine != theirs:
                raise CalibrationError(
                    f"statistics whose tokens are weighed in different ways cannot be added: {mine!r} and {theirs!r} (sites: "
                    f"{name}). Calibrate both with one weighting"
                )
        merged = {name: own.merge(other.sites[name]) for name, own in self.sites.items()}
        return replace(
            self,
            sites=merged,
            batch_count=self.batch_count + other.batch_count,
            source=" and ".join(dict.fromkeys((self.source, other.source))),
            observed_by="+".join(sorted({*self.observed_by.split("+"), *other.observed_by.split("+")})),
            padding_masks=tuple(dict.fromkeys((*self.padding_masks, *other.padding_masks))),
            diagnostics=tuple(dict.fromkeys((*self.diagnostics, *other.diagnostics))),
            fingerprint=self.fingerprint if self.fingerprint == other.fingerprint else "",
        )

    def check(self) -> None:
        """Refuse statistics that cannot rank weights.

        Raises:
            CalibrationError: a sum is NaN or infinite (names the site and the feature).
        """
        for name, site in self.sites.items():
            finite = torch.isfinite(site.sum_of_squares if site.norm_sum is None else site.sum_of_squares + site.norm_sum)
            if not bool(finite.all()):
                feature = int((~finite).nonzero()[0])
                raise CalibrationError(
                    f"the input of {name} holds NaN or infinity in feature {feature} "
                    f"({int((~finite).sum())} of {finite.numel()} features): its norm cannot rank weights. "
                    f"Check the calibration data and the checkpoint"
                )

    def check_fits(self, sites: Iterable[PruneSite], fingerprint: str = "") -> None:
        """Refuse statistics that are not of these sites: those of another model, or of other regions or targets.

        Args:
            sites: the sites that are to be pruned.
            fingerprint: of the model that is to be pruned; "" does not compare it.

        Raises:
            InputError: a site has no statistics or another width (names it), or the model is known to be another one.
        """
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            raise InputError(
                f"the statistics were taken from a model with fingerprint {self.fingerprint[:16]}..., this model's is "
                f"{fingerprint[:16]}...: its weights are different. Calibrate this model, or load those weights"
            )
        for site in sites:
            own = self.sites.get(site.name)
            if own is None or own.sum_of_squares.shape != (site.in_features,):
                found = "none" if own is None else f"those of {own.sum_of_squares.numel()} input features"
                raise InputError(
                    f"the statistics hold {found} for {site.name}, which has {site.in_features} input features: they are of "
                    f"another model, or of other regions or targets. Calibrate with the options that you prune with"
                )

    def save(self, path: Path | str) -> Path:
        """Write the statistics as safetensors, complete or not at all; ``load`` gives them back to the bit."""
        from mfcompile.statistics_file import save_statistics

        return save_statistics(self, Path(path))

    @classmethod
    def load(cls, path: Path | str) -> CalibrationStatistics:
        """Read statistics and check their digest.

        Raises:
            InputError: the file is missing, holds no statistics, is of another format version, or is damaged.
        """
        from mfcompile.statistics_file import load_statistics

        return load_statistics(Path(path))


NO_STATISTICS = CalibrationStatistics({}, 0, "no calibration", "")
"""Of a criterion that needs none."""
