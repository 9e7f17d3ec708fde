"""Prune sites made by hand, of any shape and layout, without a model that would have to compute with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

import mfcompile
from mfcompile.inputs import ExampleInputs
from mfcompile.masks import MaskSet
from mfcompile.passes.mask_selection import site_weight
from mfcompile.region import ROWS, PruneSite, WeightLayout
from mfcompile.statistics import CalibrationStatistics, SiteStatistics


class MadeModel:
    """Parameters and the sites that lie in them.

    Attributes:
        captured: a captured model whose graph computes nothing.
        regions: its regions.
        statistics: random norms of every site.
    """

    def __init__(self) -> None:
        module = nn.Module()
        graph_module = fx.GraphModule(module, fx.Graph())
        self.captured = mfcompile.CapturedGraph(graph_module, module, ExampleInputs((), {}, ()), (), (), {}, {}, "by hand")
        self._sites: list[PruneSite] = []
        self._statistics: dict[str, SiteStatistics] = {}

    def add(
        self,
        name: str,
        parameter: Tensor,
        region: str = "text",
        layout: WeightLayout = ROWS,
        rows: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Add a parameter, with a site for every expert and every range of output rows."""
        self.captured.module.register_parameter(name, nn.Parameter(parameter))
        experts, outputs, inputs = layout.sizes(parameter.shape)
        for expert in range(experts):
            for start, stop in rows or [(0, outputs)]:
                where = (f"[{expert}]" if layout.experts else "") + (f"[{start}:{stop}]" if rows else "")
                number = expert if layout.experts else None
                site = PruneSite(name + where, name, (start, stop), stop - start, inputs, layout, region, expert=number)
                self._sites.append(site)
                generator = torch.Generator().manual_seed(len(self._sites))
                squares = torch.rand(inputs, generator=generator, dtype=torch.float64) * 9 + 0.1
                self._statistics[site.name] = SiteStatistics(squares, 7, 0, 3)

    @property
    def regions(self) -> mfcompile.RegionMap:
        weights = {site.fqn: site.region for site in self._sites}
        return mfcompile.RegionMap((), weights, {}, tuple(self._sites), {})

    @property
    def statistics(self) -> CalibrationStatistics:
        return CalibrationStatistics(self._statistics, 1, "made by hand", "")

    @property
    def sites(self) -> tuple[PruneSite, ...]:
        return tuple(self._sites)

    def select(self, **options: Any) -> MaskSet:
        return mfcompile.select_masks(self.captured, self.regions, self.statistics, **options)

    def removed(self, masks: MaskSet) -> dict[str, NDArray[np.bool_]]:
        """Site -> (out_features, in_features), True where a weight is removed."""
        return {site.name: ~site.matrix(site.layout.matrices(masks[site.fqn])).numpy() for site in self._sites}

    def weight(self, site: PruneSite) -> NDArray[np.float32]:
        """(out_features, in_features)."""
        return site_weight(self.captured, site).numpy()


def made(shapes: Mapping[str, Sequence[tuple[int, int]]], seed: int = 0, *, has_ties: bool = False) -> MadeModel:
    """A model of plain weights: region -> shapes, each weight with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = MadeModel()
    for region, listed in shapes.items():
        for index, shape in enumerate(listed):
            weight = torch.randn(shape, generator=generator) * (0.5 + torch.rand(1, generator=generator))
            model.add(f"{region}{index}", (weight * 2).round() / 2 if has_ties else weight, region)
    return model


def subset(one: Mapping[str, NDArray[np.bool_]], other: Mapping[str, NDArray[np.bool_]]) -> bool:
    """Whatever is marked in one is marked in the other."""
    return all(not (one[name] & ~other[name]).any() for name in one)
