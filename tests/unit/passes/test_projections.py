"""Linear weights in unusual storage: packed, fused, turned, with heads in dimensions of their own, or no matrix at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.errors import InputError
from mfcompile.region import COLUMNS, ROWS, RegionMap, WeightLayout

BATCH, TOKENS, WIDTH, HEADS, HEAD = 3, 5, 6, 2, 3
# Float32 sums of a few dozen squares, against float64.
RTOL = 1e-6


class Net(nn.Module):
    """Two layers of parameters and a function that uses them."""

    class Layer(nn.Module):
        def __init__(self, shapes: Mapping[str, tuple[int, ...]], use: Callable[[Any, Tensor], Tensor]) -> None:
            super().__init__()
            self.use = use
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape) / 3))
            self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

        def forward(self, states: Tensor) -> Tensor:
            result: Tensor = self.down(self.up(self.use(self, states)).relu())
            return result

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer(shapes, use) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return image


def states() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))


def regions_of(model: nn.Module, **options: Any) -> tuple[mfcompile.CapturedGraph, RegionMap]:
    captured = mfcompile.capture(model, states())
    return captured, mfcompile.infer_regions(captured, modalities={"image": "vision"}, **options)


@dataclass(frozen=True)
class Case:
    """A use of one weight ``w`` in the first layer.

    Attributes:
        shape: of the weight.
        use: what the layer computes.
        layout: how it must be read.
        inputs: what reaches it, (rows, in_features) of the states; of every expert in turn where it has several.
        sites: what follows the FQN in the names of its sites.
    """

    shape: tuple[int, ...]
    use: Callable[[Any, Tensor], Tensor]
    layout: WeightLayout
    inputs: Callable[[Tensor], list[Tensor]] = field(default=lambda x: [x.reshape(-1, WIDTH)])
    sites: tuple[str, ...] = ("",)


def heads_of(states: Tensor) -> Tensor:
    return states.view(BATCH, TOKENS, HEADS, HEAD)


CASES = {
    "heads behind the input": Case(
        (WIDTH, HEADS, HEAD),
        lambda m, x: torch.einsum("bnd,dhk->bnhk", x, m.w).flatten(2),
        WeightLayout(outputs=(1, 2), inputs=(0,)),
    ),
    "heads before the input": Case(
        (HEADS, HEAD, WIDTH),
        lambda m, x: torch.einsum("...d,hkd->...hk", x, m.w).flatten(2),
        WeightLayout(outputs=(0, 1), inputs=(2,)),
    ),
    "heads around the input": Case(
        (HEADS, WIDTH, HEAD),
        lambda m, x: torch.einsum("bnd,hdk->bnhk", x, m.w).flatten(2),
        WeightLayout(outputs=(0, 2), inputs=(1,)),
    ),
    "heads summed over": Case(
        (HEADS, HEAD, WIDTH),
        lambda m, x: torch.einsum("bnhk,hkd->bnd", heads_of(x), m.w),
        WeightLayout(outputs=(2,), inputs=(0, 1)),
    ),
    "heads summed over in another order": Case(
        (WIDTH, HEADS, HEAD),
        lambda m, x: torch.einsum("bnkh,dhk->bnd", heads_of(x).mT, m.w),
        WeightLayout(outputs=(0,), inputs=(1, 2)),
    ),
    "heads of their own": Case(
        (HEADS, HEAD, HEAD),
        lambda m, x: torch.einsum("bnhk,hkl->bnhl", heads_of(x), m.w).flatten(2),
        WeightLayout(outputs=(2,), inputs=(1,), experts=(0,)),
        lambda x: [x.reshape(-1, HEADS, HEAD)[:, head] for head in range(HEADS)],
        ("[0]", "[1]"),
    ),
    "stacked matrices, one by one": Case(
        (2, WIDTH, WIDTH),
        lambda m, x: F.linear(x, m.w[0]) + F.linear(2 * x, m.w.unbind(0)[1]),
        WeightLayout(outputs=(1,), inputs=(2,), experts=(0,)),
        lambda x: [x.reshape(-1, WIDTH), 2 * x.reshape(-1, WIDTH)],
        ("[0]", "[1]"),
    ),
    "product for all heads": Case(
        (HEADS, WIDTH, HEAD),
        lambda m, x: (x.unsqueeze(1) @ m.w).transpose(1, 2).flatten(2),
        WeightLayout(outputs=(0, 2), inputs=(1,)),
    ),
    "tensordot": Case(
        (WIDTH, HEADS, HEAD),
        lambda m, x: torch.tensordot(x, m.w, dims=1).flatten(2),
        WeightLayout(outputs=(1, 2), inputs=(0,)),
    ),
    "tensordot over two dimensions": Case(
        (HEADS, HEAD, WIDTH),
        lambda m, x: torch.tensordot(heads_of(x), m.w, dims=2),
        WeightLayout(outputs=(2,), inputs=(0, 1)),
    ),
    "in a dimension of size one": Case(
        (1, WIDTH, WIDTH),
        lambda m, x: F.linear(x, m.w[0]),
        WeightLayout(outputs=(0, 1), inputs=(2,)),
    ),
    "turned": Case((WIDTH, WIDTH), lambda m, x: torch.addmm(x.new_zeros(WIDTH), x.flatten(0, 1), m.w).view_as(x), COLUMNS),
    "fused": Case((3 * WIDTH, WIDTH), lambda m, x: sum(F.linear(x, m.w).chunk(3, -1)), ROWS),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("observe", ["graph", "module"])
@pytest.mark.parametrize("case", CASES)
def test_layout_and_norms(case: str, observe: str) -> None:
    expected = CASES[case]
    captured, regions = regions_of(Net({"w": expected.shape}, expected.use))
    sites = [site for site in regions.pruned_sites if site.fqn == "layers.0.w"]
    assert [site.name.removeprefix("layers.0.w") for site in sites] == list(expected.sites)
    assert {site.layout for site in sites} == {expected.layout}
    statistics = mfcompile.calibrate(captured, regions=regions, observe=observe)
    for site, rows in zip(sites, expected.inputs(states()), strict=True):
        found = statistics.sites[site.name]
        np.testing.assert_allclose(found.sum_of_squares.numpy(), (rows.double() ** 2).sum(0).numpy(), rtol=RTOL)
        assert found.token_count == len(rows)


@pytest.mark.parametrize("case", [name for name, item in CASES.items() if item.sites == ("",)])
def test_its_mask_is_that_of_the_plain_linear_layer(case: str) -> None:
    """The same numbers as an nn.Linear, in another storage."""
    expected = CASES[case]
    model = Net({"w": expected.shape}, expected.use)
    masks = {}
    for is_plain in (False, True):
        captured, regions = regions_of(model)
        if is_plain:
            matrices = [expected.layout.matrices(layer.w.detach())[0] for layer in model.layers]  # type: ignore[operator]
            plain = Net({"w": tuple(matrices[0].shape)}, lambda m, x: F.linear(x, m.w)[..., :WIDTH])
            for layer, other, matrix in zip(plain.layers, model.layers, matrices, strict=True):
                layer.load_state_dict({**other.state_dict(), "w": matrix})
            captured, regions = regions_of(plain, targets=["layers.0.w"])
        else:
            captured, regions = regions_of(model, targets=["layers.0.w"])
        statistics = mfcompile.calibrate(captured, regions=regions)
        masks[is_plain] = mfcompile.select_masks(captured, regions, statistics, sparsity=0.5)["layers.0.w"]
    assert masks[False].shape == expected.shape
    assert torch.equal(expected.layout.matrices(masks[False])[0], masks[True])


def test_layouts_undo_themselves() -> None:
    for expected in CASES.values():
        weight = torch.randn(expected.shape)
        matrices = expected.layout.matrices(weight)
        assert tuple(matrices.shape) == expected.layout.sizes(expected.shape)
        assert torch.equal(expected.layout.stored(matrices, expected.shape), weight)


class Attending(nn.Module):
    """Layers of nn.MultiheadAttention, over the image or over queries of their own."""

    class Layer(nn.Module):
        def __init__(self, is_cross: bool) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.mlp = nn.Linear(WIDTH, WIDTH)
            self.queries = nn.Parameter(torch.randn(1, 4, WIDTH)) if is_cross else None

        def forward(self, image: Tensor) -> Tensor:
            queries = image if self.queries is None else self.queries.expand(len(image), -1, -1)
            result: Tensor = self.mlp(self.attention(queries, image, image)[0])
            return result

    def __init__(self, is_cross: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer(is_cross) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return image


@pytest.mark.parametrize("observe", ["graph", "module"])
def test_a_packed_in_proj_is_cut_where_its_inputs_differ(observe: str) -> None:
    captured, regions = regions_of(Attending(is_cross=True))
    names = [site.name for site in regions.pruned_sites if "layers.0.attention" in site.name]
    weight = "layers.0.attention.in_proj_weight"
    assert names == [f"{weight}[0:6]", f"{weight}[6:18]", "layers.0.attention.out_proj.weight"]
    statistics = mfcompile.calibrate(captured, regions=regions, observe=observe)
    queries = captured.module.layers[0].queries.detach().expand(BATCH, -1, -1)  # type: ignore[index, union-attr]
    for name, reaching in ((names[0], queries), (names[1], states())):
        rows = reaching.reshape(-1, WIDTH).double()
        np.testing.assert_allclose(statistics.sites[name].sum_of_squares.numpy(), (rows**2).sum(0).numpy(), rtol=RTOL)
    assert {site.region for site in regions.pruned_sites} == {"vision"}  # the queries belong to the layer that reads the image


def test_a_packed_in_proj_of_self_attention_is_one_site() -> None:
    _, regions = regions_of(Attending(is_cross=False))
    assert "layers.0.attention.in_proj_weight" in {site.name for site in regions.pruned_sites}


def test_a_turned_weight_of_transformers_is_read_as_columns() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(pytorch_utils.Conv1D(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2)
            )

        def forward(self, image: Tensor) -> Tensor:
            for layer in self.layers:
                image = layer(image)
            return image

    _, regions = regions_of(Wrapped())
    assert {site.fqn: site.layout for site in regions.pruned_sites}["layers.0.0.weight"] == COLUMNS


class TestWhatIsNoMatrix:
    def test_a_bilinear_form_is_listed_and_refused(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.form = nn.Bilinear(WIDTH, WIDTH, 4)

            def forward(self, image: Tensor) -> Tensor:
                result: Tensor = self.form(image, image.flip(1))
                return result

        _, regions = regions_of(Model())
        (site,) = regions.sites
        assert site.fqn == "form.weight"
        assert "multiplies it by two activations at once" in (site.skipped or "")
        with pytest.raises(InputError, match="by two activations at once"):
            regions_of(Model(), targets=["form"])

    def test_a_sum_over_part_of_the_inputs_is_said(self) -> None:
        model = Net({"w": (WIDTH, 2 * WIDTH)}, lambda m, x: F.linear(x, m.w[:, :WIDTH]) + F.linear(x.flip(1), m.w[:, WIDTH:]))
        _, regions = regions_of(model)
        (reason,) = {item.reason for item in regions.diagnostics if item.subject == "layers.0.w"}
        assert reason.endswith("uses (6, 6) of (6, 12) as no block of whole output rows of a linear layer")

    def test_a_product_of_three_is_said(self) -> None:
        model = Net({"w": (HEADS, WIDTH, WIDTH)}, lambda m, x: torch.einsum("bnd,hde,bne->bnd", x, m.w, x))
        _, regions = regions_of(model)
        (reason,) = {item.reason for item in regions.diagnostics if item.subject == "layers.0.w"}
        assert "as no block of whole output rows of a linear layer" in reason

    def test_two_ways_to_read_one_weight_disagree(self) -> None:
        model = Net({"w": (WIDTH, WIDTH)}, lambda m, x: F.linear(x, m.w) @ m.w)
        _, regions = regions_of(model)
        reasons = {site.fqn: site.skipped for site in regions.sites}
        assert reasons["layers.0.w"] == "it is used both ways round (as W and as its transpose)"
        model = Net({"w": (2, WIDTH, WIDTH)}, lambda m, x: F.linear(x, m.w[0]) + F.linear(x, m.w.flatten(0, 1))[..., :WIDTH])
        _, regions = regions_of(model)
        reasons = {site.fqn: site.skipped for site in regions.sites}
        assert reasons["layers.0.w"] == "its uses disagree about which of its dimensions are inputs, outputs and experts"
