"""Layers that no container repeats, layers of one weight, and weights that meet a parameter: what is pruned, and where."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.region import RegionMap
from tests.zoo.parts import WIDTH, Attention, CrossBlock, FeedForward, Patches, SelfBlock, Words

HEAD = "outside any repeated block (a head or a projector)"


def picture() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def words() -> Tensor:
    return torch.randint(2, 48, (3, 6), generator=torch.Generator().manual_seed(2))


class TwoTowers(nn.Module):
    """An image tower, a text tower, and something that joins them."""

    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.words = Patches(), Words()
        self.vision = nn.ModuleList(SelfBlock() for _ in range(2))
        self.text = nn.ModuleList(SelfBlock() for _ in range(2))
        self.join = join
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        seen, text = self.patches(image), self.words(ids)
        for layer in self.vision:
            seen = layer(seen)
        for layer in self.text:
            text = layer(text)
        result: Tensor = self.head(self.join(text, seen))
        return result


def regions_of(model: nn.Module) -> RegionMap:
    return mfcompile.infer_regions(mfcompile.capture(model, {"image": picture(), "ids": words()}))


def fate(regions: RegionMap, below: str = "join") -> dict[str, str]:
    """Weight under a path -> its region, or why it is dense."""
    sites = [site for site in regions.sites if site.fqn.startswith(below)]
    return {site.name.removeprefix(f"{below}."): site.skipped or site.region for site in sites}


def test_a_single_fusion_layer_is_a_layer() -> None:
    """Its self-attention reads text alone, and belongs to the layer that fuses."""
    found = fate(regions_of(TwoTowers(CrossBlock())))
    assert len(found) == 10
    assert set(found.values()) == {"fusion"}


def test_it_may_lie_in_a_module_with_a_projector_of_its_own() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.layer, self.out = nn.Linear(WIDTH, WIDTH), CrossBlock(), nn.Linear(WIDTH, WIDTH)

        def forward(self, text: Tensor, seen: Tensor) -> Tensor:
            result: Tensor = self.out(self.layer(text, self.project(seen)))
            return result

    found = fate(regions_of(TwoTowers(Join())))
    assert {name for name, fate in found.items() if fate == HEAD} == {"project.weight", "out.weight"}
    assert len({name for name, fate in found.items() if fate == "fusion"}) == 10


def test_an_attention_alone_is_no_layer() -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, text: Tensor, seen: Tensor) -> Tensor:
            result: Tensor = self.attention(text, seen)
            return result

    assert set(fate(regions_of(TwoTowers(Join()))).values()) == {HEAD}


def test_the_model_itself_is_no_layer() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.words = Patches(), Words()
            self.attention, self.ff, self.head = Attention(), FeedForward(), nn.Linear(WIDTH, 2)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            text = self.words(ids)
            text = text + self.attention(text, self.patches(image))
            result: Tensor = self.head(self.ff(text))
            return result

    regions = regions_of(Flat())
    assert {use.block for uses in regions.evidence.values() for use in uses} == {None}
    assert "head.weight" not in {site.fqn for site in regions.pruned_sites}  # the others are: no layer shows anywhere


class Items(nn.Module):
    """Joins by adding, then applies what is given."""

    def __init__(self, items: nn.Module, apply: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.items, self.apply_to = items, apply

    def forward(self, text: Tensor, seen: Tensor) -> Tensor:
        return self.apply_to(self.items, text + seen.mean(1, keepdim=True))


def one_by_one(items: nn.Module, states: Tensor) -> Tensor:
    for item in items.children():
        states = item(states).relu()
    return states


class Residual(nn.Module):
    """A layer of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        result: Tensor = states + self.inner(self.norm(states)).relu()
        return result


def parameters(items: nn.Module, states: Tensor) -> Tensor:
    for weight in items.parameters():
        states = F.linear(states, weight).relu()
    return states


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)

    def forward(self, states: Tensor) -> Tensor:
        for index in range(3):
            states = (states @ self.weight[index]).relu()
        return states


def called(items: nn.Module, states: Tensor) -> Tensor:
    result: Tensor = items(states)
    return result


CHAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "list of linear layers": (
        lambda: nn.ModuleList([nn.Linear(WIDTH, 24), nn.Linear(24, 24), nn.Linear(24, WIDTH)]),
        one_by_one,
        ["items.0.weight", "items.1.weight", "items.2.weight"],
    ),
    "list of layers of one weight": (
        lambda: nn.ModuleList(Residual() for _ in range(2)),
        one_by_one,
        ["items.0.inner.weight", "items.1.inner.weight"],
    ),
    "sequence of layers of one weight": (
        lambda: nn.Sequential(*(Residual() for _ in range(2))),
        called,
        ["items.0.inner.weight", "items.1.inner.weight"],
    ),
    "list of parameters": (
        lambda: nn.ParameterList(torch.randn(WIDTH, WIDTH) / 4 for _ in range(3)),
        parameters,
        ["items.0", "items.1", "items.2"],
    ),
    "stacked parameter": (Stack, called, ["items.weight[0]", "items.weight[1]", "items.weight[2]"]),
}


@pytest.mark.parametrize("case", CHAINED)
def test_items_of_which_one_feeds_another_are_layers(case: str) -> None:
    build, apply, expected = CHAINED[case]
    assert fate(regions_of(TwoTowers(Items(build(), apply)))) == dict.fromkeys(expected, "fusion")


UNCHAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "heads side by side": (
        lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)),
        lambda items, states: torch.stack([item(states) for item in items.children()]).sum(0),
    ),
    "a sequence of linear layers": (
        lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
        called,
    ),
    "one linear layer in a list": (lambda: nn.ModuleList([nn.Linear(WIDTH, WIDTH)]), one_by_one),
}


@pytest.mark.parametrize("case", UNCHAINED)
def test_items_that_feed_none_of_their_kind_are_heads(case: str) -> None:
    build, apply = UNCHAINED[case]
    assert set(fate(regions_of(TwoTowers(Items(build(), apply)))).values()) == {HEAD}


class SharedKeys(nn.Module):
    """Learned queries are projected by the very key weight that the image meets."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
            self.queries = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)
            self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

        def forward(self, states: Tensor) -> Tensor:
            keys, queries = states @ self.key, self.queries @ self.key
            mixed = (queries @ keys.mT).softmax(-1) @ states
            result: Tensor = self.down(self.up(states + mixed.mean(1, keepdim=True)).relu())
            return result

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return image


def test_a_weight_that_meets_learned_queries_too_is_pruned() -> None:
    model = SharedKeys()
    image = torch.randn(3, 5, WIDTH)
    captured = mfcompile.capture(model, image)
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    pruned = {site.fqn for site in regions.pruned_sites}
    assert {"layers.0.key", "layers.1.key"} <= pruned
    assert not any("queries" in fqn for fqn in regions.weights)
    rows = torch.cat([image.reshape(-1, WIDTH), model.layers[0].queries.detach()]).double()  # type: ignore[operator]
    for observe in ("graph", "module"):
        found = mfcompile.calibrate(captured, regions=regions, observe=observe).sites["layers.0.key"]
        torch.testing.assert_close(found.sum_of_squares, (rows**2).sum(0), rtol=1e-6, atol=0)


def test_two_parameters_that_meet_nothing_else_cannot_be_told_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

        def forward(self, image: Tensor) -> Tensor:
            return image + self.one @ self.other

    regions = mfcompile.infer_regions(mfcompile.capture(Model(), torch.randn(3, WIDTH, WIDTH)), modalities={"image": "vision"})
    reasons = {item.subject: item.reason for item in regions.diagnostics}
    assert "multiplies it with another parameter, other: which of the two is the weight" in reasons["one"]
    assert not regions.sites


class Unrolled(nn.Module):
    """Two stacks and their fusion as matrices in one dictionary, indexed by names that are put together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = [f"{tower}_{role}_{depth}" for tower in "vtf" for role in "qkvom" for depth in range(2)]
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2) for name in names})
        self.lift, self.words = nn.Linear(192, WIDTH), nn.Embedding(48, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def layer(self, tower: str, depth: int, x: Tensor, context: Tensor) -> Tensor:
        q, k, v, o, m = (self.weights[f"{tower}_{role}_{depth}"] for role in "qkvom")
        x = x + ((x @ q) @ (context @ k).mT).softmax(-1) @ (context @ v) @ o
        out: Tensor = x + torch.tanh(x) @ m
        return out

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        seen, text = self.lift(image.flatten(1))[:, None], self.words(ids)
        for depth in range(2):
            seen = self.layer("v", depth, seen, seen)
            text = self.layer("t", depth, text, text)
        for depth in range(2):
            text = self.layer("f", depth, text, seen)
        result: Tensor = self.head(text)
        return result


def test_where_no_layer_shows_all_but_heads_are_pruned_and_it_is_said() -> None:
    regions = regions_of(Unrolled())
    pruned = {site.fqn: site.region for site in regions.pruned_sites}
    towers = {"v": "vision", "t": "text", "f": "fusion"}
    expected = {f"weights.{name}": towers[name[0]] for name in Unrolled().weights}
    assert pruned == {**expected, "lift.weight": "vision"}
    assert {site.fqn: site.skipped for site in regions.skipped_sites} == {"head.weight": HEAD}
    assert any("no layers were found" in item.reason for item in regions.diagnostics)


def test_where_layers_show_what_lies_outside_stays_dense() -> None:
    regions = regions_of(TwoTowers(CrossBlock()))
    assert not any("no layers were found" in item.reason for item in regions.diagnostics)
    assert "head.weight" in {site.fqn for site in regions.skipped_sites}
