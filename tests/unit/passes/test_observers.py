"""Observers: what reaches each weight, seen from the graph and from the module alike, for every way to use a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.errors import PreconditionError
from mfcompile.module_copy import storage_address
from mfcompile.passes.base import run_transform
from mfcompile.passes.observers import InsertObservers, ModuleObserver, StatisticsCollector
from mfcompile.passes.padding import PaddingPlan
from tests.models import tiny_vlm, vlm_batch, vlm_captured, vlm_regions

# Float32 sums of a few dozen squares, against float64.
RTOL = 1e-6
# A second eager run may round otherwise (memory alignment); small features are differences of large ones.
RTOL_OF_RUNS = 1e-5
# Both observers reduce the same activations; a graph's kernels are the module's.
RTOL_OF_OBSERVERS = 1e-12

WIDTH = 4


class Repeat(nn.Module):
    """Two equal blocks, one after the other: what makes their weights prune sites."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.items = nn.ModuleList([build(), build()])

    def forward(self, image: Tensor) -> Tensor:
        for item in self.items:
            image = item(image)
        return image


class Block(nn.Module):
    """Parameters, and a function that uses them."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 2))
        self.use = use

    def forward(self, image: Tensor) -> Tensor:
        return self.use(self, image)


@dataclass(frozen=True)
class Use:
    """A way to use weights, and what reaches each site of the first block."""

    shapes: Mapping[str, tuple[int, int]]
    forward: Callable[[Any, Tensor], Tensor]
    expected: Callable[[Any, Tensor], Mapping[str, Tensor]]


SQUARE = {"w": (WIDTH, WIDTH), "v": (WIDTH, WIDTH)}


def both(m: Any, x: Tensor) -> dict[str, Tensor]:
    return {"w": x, "v": torch.tanh(x @ m.w.t())}


def through(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: product(torch.tanh(product(x, m.w)), m.v)


def mutated(m: Any, x: Tensor) -> Tensor:
    states = x.clone()
    first = F.linear(states, m.w)
    states.view(-1)[:3] += 1.0
    return first + F.linear(states, m.v)


def after_mutation(m: Any, x: Tensor) -> dict[str, Tensor]:
    changed = x.clone()
    changed.view(-1)[:3] += 1.0
    return {"w": x, "v": changed}


USES = {
    "linear": Use(SQUARE, through(F.linear), both),
    "matmul with the transpose": Use(SQUARE, through(lambda x, w: x @ w.t()), both),
    "matmul, weight first": Use(SQUARE, through(lambda x, w: (w @ x.transpose(1, 2)).transpose(1, 2)), both),
    "einsum": Use(SQUARE, through(lambda x, w: torch.einsum("bti,oi->bto", x, w)), both),
    "einsum, features in the middle": Use(
        SQUARE, through(lambda x, w: torch.einsum("bit,oi->bot", x.transpose(1, 2), w).transpose(1, 2)), both
    ),
    "addmm on flat rows": Use(
        SQUARE, through(lambda x, w: torch.addmm(torch.zeros(WIDTH), x.flatten(0, 1), w.t()).view(x.shape)), both
    ),
    "cast": Use(SQUARE, through(lambda x, w: F.linear(x.double(), w.double()).float()), both),
    "cast, then transposed": Use(SQUARE, through(lambda x, w: (x.double() @ w.double().t()).float()), both),
    "transposed copy": Use(SQUARE, through(lambda x, w: x @ w.t().contiguous()), both),
    "detached": Use(SQUARE, through(lambda x, w: F.linear(x, w.data)), both),
    "stored the other way round": Use(
        {"w": (WIDTH, 6), "v": (6, WIDTH)},
        lambda m, x: torch.tanh(x @ m.w) @ m.v,
        lambda m, x: {"w": x, "v": torch.tanh(x @ m.w)},
    ),
    "rows of a fused weight": Use(
        {"w": (3 * WIDTH, WIDTH)},
        lambda m, x: F.linear(torch.tanh(F.linear(x, m.w[:WIDTH])), m.w[WIDTH : 2 * WIDTH]) + F.linear(x, m.w[2 * WIDTH :]),
        lambda m, x: {"w[0:4]": x, "w[4:8]": torch.tanh(x @ m.w[:WIDTH].t()), "w[8:12]": x},
    ),
    "chunks of a fused weight, cast": Use(
        {"w": (2 * WIDTH, WIDTH)},
        lambda m, x: F.linear(torch.tanh(F.linear(x.double(), m.w.chunk(2)[0].double())), m.w.chunk(2)[1].double()).float(),
        lambda m, x: {"w[0:4]": x, "w[4:8]": torch.tanh(x @ m.w[:WIDTH].t())},
    ),
    "called twice": Use(
        SQUARE,
        lambda m, x: F.linear(F.linear(x, m.w) + F.linear(torch.tanh(x), m.w), m.v),
        lambda m, x: {"w": torch.cat([x, torch.tanh(x)]), "v": x @ m.w.t() + torch.tanh(x) @ m.w.t()},
    ),
    "called twice on the same": Use(
        SQUARE,
        lambda m, x: F.linear(F.linear(x, m.w) + F.linear(x.clone(), m.w), m.v),
        lambda m, x: {"w": x, "v": 2 * x @ m.w.t()},
    ),
    "shared with a weight that is called twice": Use(
        SQUARE,
        lambda m, x: F.linear(x, m.v) + F.linear(x, m.w) + F.linear(x.clone(), m.w),
        lambda m, x: {"w": x, "v": x},
    ),
    "written in place between two uses": Use(SQUARE, mutated, after_mutation),
}


@pytest.mark.parametrize("how", ["graph", "module"])
@pytest.mark.parametrize("name", USES)
def test_every_way_to_use_a_weight(name: str, how: str) -> None:
    use = USES[name]
    torch.manual_seed(0)
    model = Repeat(lambda: Block(use.shapes, use.forward))
    captured = mfcompile.capture(model, torch.randn(2, 3, WIDTH))
    regions = mfcompile.infer_regions(captured, targets=["*"])
    image = torch.randn(2, 3, WIDTH)
    statistics = mfcompile.calibrate(captured, [image], regions=regions, observe=how)
    assert statistics.observed_by == how
    with torch.no_grad():
        expected = use.expected(model.items[0], image)
    for site, activation in expected.items():
        found = statistics.sites[f"items.0.{site}"]
        np.testing.assert_allclose(
            found.sum_of_squares.numpy(), activation.double().square().flatten(0, -2).sum(0).numpy(), rtol=RTOL, err_msg=site
        )
        assert found.token_count == activation.numel() // activation.shape[-1]


class Attending(nn.Module):
    """nn.MultiheadAttention as self- and cross-attention, its projections packed in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        text = text + self.own(text, text, text, need_weights=False)[0]
        result: Tensor = text + self.cross(text, image, image)[0]
        return result


class Attention2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.ModuleList([Attending(), Attending()])

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for item in self.items:
            text = item(text, image)
        return text


def attention_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "text": torch.randn(2, 3, WIDTH, generator=generator) * 2,
        "image": torch.randn(2, 5, WIDTH, generator=generator),
    }


@pytest.mark.parametrize("how", ["graph", "module"])
def test_packed_projections_are_seen_by_the_rows_that_meet_each_input(how: str) -> None:
    torch.manual_seed(0)
    model, inputs = Attention2(), attention_inputs()
    captured = mfcompile.capture(model, inputs)
    regions = mfcompile.infer_regions(captured, modalities={"text": "text", "image": "vision"})
    statistics = mfcompile.calibrate(captured, [inputs], regions=regions, observe=how)
    names = [site.name for site in regions.pruned_sites if site.fqn == "items.0.cross.in_proj_weight"]
    assert names == ["items.0.cross.in_proj_weight[0:4]", "items.0.cross.in_proj_weight[4:12]"]
    text, image = inputs["text"], inputs["image"]
    with torch.no_grad():
        states = text + model.items[0].own(text, text, text)[0]  # type: ignore[operator]
    expected = {
        "items.0.own.in_proj_weight": text,
        "items.0.cross.in_proj_weight[0:4]": states,
        "items.0.cross.in_proj_weight[4:12]": image,
    }
    for name, activation in expected.items():
        np.testing.assert_allclose(
            statistics.sites[name].sum_of_squares.numpy(),
            activation.double().square().sum((0, 1)).numpy(),
            rtol=RTOL,
            err_msg=name,
        )
    assert regions.weights["items.0.own.out_proj.weight"] == regions.weights["items.0.cross.out_proj.weight"]


def test_graph_and_module_observers_agree() -> None:
    """All sites of a VLM, on batches with padding that the example does not have."""
    batches = [vlm_batch((6, lengths), seed=lengths) for lengths in (2, 5)]
    graph, module = (
        mfcompile.calibrate(vlm_captured(), batches, regions=vlm_regions(), observe=how) for how in ("graph", "module")
    )
    assert (graph.observed_by, module.observed_by) == ("graph", "module")
    assert list(graph.sites) == list(module.sites)
    for name, found in graph.sites.items():
        torch.testing.assert_close(
            found.sum_of_squares, module.sites[name].sum_of_squares, rtol=RTOL_OF_OBSERVERS, atol=0.0, msg=name
        )
        counts = (found.token_count, found.padding_count, found.sample_count)
        assert counts == (module.sites[name].token_count, module.sites[name].padding_count, module.sites[name].sample_count)


def linear_inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Inputs of every nn.Linear, by plain forward hooks."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: found.setdefault(f"{name}.weight", []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_statistics_of_a_vlm_are_those_of_numpy() -> None:
    batches = [vlm_batch((6, 3, 5), seed=1), vlm_batch((2, 4), seed=2)]
    statistics = mfcompile.calibrate(vlm_captured(), batches, regions=vlm_regions())
    expected: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    tokens: dict[str, int] = {}
    for batch in batches:
        for name, calls in linear_inputs(tiny_vlm(), batch).items():
            (activation,) = calls
            values = activation.double().numpy()
            is_image = name.startswith("vision") or name.split(".")[2:4] in (["cross", "key"], ["cross", "value"])
            mask = np.ones(values.shape[:2], bool) if is_image else batch["attention_mask"].numpy() == 1
            assert mask.shape == values.shape[:2] or name == "head.weight"
            if name != "head.weight":
                expected[name] = expected.get(name, 0) + np.square(values[mask]).sum(0)
                tokens[name] = tokens.get(name, 0) + int(mask.sum())
    assert set(expected) == set(statistics.sites)
    for name, found in statistics.sites.items():
        np.testing.assert_allclose(found.sum_of_squares.numpy(), expected[name], rtol=RTOL_OF_RUNS, err_msg=name)
        assert found.token_count == tokens[name]


def test_one_reduction_serves_query_key_and_value() -> None:
    collector = StatisticsCollector(vlm_regions().pruned_sites, PaddingPlan())
    instrumented = run_transform(InsertObservers(vlm_regions(), collector), vlm_captured()).graph
    observers = [node for node in instrumented.graph.nodes if node.op == "call_module"]
    distinct = {(use.activation) for site in collector.sites for use in vlm_regions().evidence[site.fqn]}
    assert len(observers) == len(distinct) < len(collector.sites)


def test_observers_leave_the_graph_they_were_given() -> None:
    before = str(vlm_captured().graph)
    collector = StatisticsCollector(vlm_regions().pruned_sites, PaddingPlan())
    result = run_transform(InsertObservers(vlm_regions(), collector), vlm_captured())
    assert result.modified
    assert str(vlm_captured().graph) == before
    assert not any(name.startswith("mfcompile") for name, _ in vlm_captured().graph_module.named_modules())


def test_regions_of_another_graph_are_refused() -> None:
    other = mfcompile.capture(Attention2(), attention_inputs())
    with pytest.raises(PreconditionError, match="made for another graph: it has no node"):
        run_transform(InsertObservers(vlm_regions(), StatisticsCollector((), PaddingPlan())), other)


def test_no_activation_is_kept_alive() -> None:
    model = tiny_vlm()
    collector = StatisticsCollector(vlm_regions().pruned_sites, PaddingPlan())
    observer = ModuleObserver(model, collector)
    collector.begin_batch(vlm_batch())
    with torch.inference_mode(), observer:
        model(**vlm_batch())
    assert [reference() for reference, *_ in observer._recent] == [None] * len(observer._recent)


def test_a_copied_weight_is_forgotten_with_its_memory() -> None:
    """Its address may belong to an activation later."""
    model = tiny_vlm()
    observer = ModuleObserver(model, StatisticsCollector(vlm_regions().pruned_sites, PaddingPlan()))
    with torch.inference_mode(), observer:
        copy = model.get_parameter("text.0.up.weight").double()
    (entry,) = observer.places.copies.values()
    later = torch.empty_like(copy)
    observer.places.copies[storage_address(later)] = entry
    assert [place.fqn for place in observer.places.of(later)] == ["text.0.up.weight"]
    del copy
    assert observer.places.of(later) == []
    assert storage_address(later) not in observer.places.copies
