"""The quotient graph: a few nodes for any depth, with the flow of the model between them."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.layered_layout import lay_out
from mfcompile.passes.block_graph import block_graph
from mfcompile.region_plot import fold, plot_regions
from mfcompile.report_plot import STYLE


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, states: Tensor, context: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.q(states), self.k(context), self.v(context))
        states = states + self.o(mixed)
        result: Tensor = states + self.down(nn.functional.gelu(self.up(states)))
        return result


class Model(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.words = nn.Embedding(50, 8)
        self.a = nn.ModuleList(Layer() for _ in range(depth))
        self.b = nn.ModuleList(Layer() for _ in range(depth))
        self.c = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(8, 2)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.a:
            image = layer(image, image)
        text = self.words(input_ids)
        for layer in self.b:
            text = layer(text, text)
        for layer in self.c:
            text = layer(text, image)
        return {"logits": self.head(text.mean(1)), "image": image}


def quotient(depth: int) -> nx.DiGraph:
    """Of weights so small that 60 layers without a norm do not blow rounding up to what looks like another output."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(2, 3, 8, 8, generator=generator),
        "input_ids": torch.randint(0, 50, (2, 5), generator=generator),
    }
    model = Model(depth).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    captured = mfcompile.capture(model, inputs)
    return block_graph(captured, mfcompile.infer_regions(captured))


@pytest.mark.parametrize("depth", [2, 12])
def test_flow_and_counts_do_not_depend_on_depth(depth: int) -> None:
    graph = quotient(depth)
    assert set(graph.edges) == {
        ("pixel_values", "a (vision)"),
        ("input_ids", "b (text)"),
        ("a (vision)", "c (fusion)"),
        ("b (text)", "c (fusion)"),
        ("c (fusion)", "head"),
        ("head", "logits"),
        ("a (vision)", "image"),
    }
    assert graph.nodes["c (fusion)"] == {
        "kind": "stack",
        "region": "fusion",
        "blocks": depth,
        "layers": depth * 6,
        "weights": depth * (4 * 64 + 2 * 128),
        "pruned": depth * (4 * 64 + 2 * 128),
    }
    assert graph.nodes["head"] == {"kind": "head", "region": "fusion", "blocks": 1, "layers": 1, "weights": 16, "pruned": 0}


@pytest.mark.parametrize("depth", [1, 2, 60])
def test_the_picture_names_every_node_and_counts_its_blocks(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    graph = quotient(depth)
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")
    drawn = svg(graph)
    times = f"  × {depth}" if depth > 1 else ""  # noqa: RUF001
    for name, data in graph.nodes(data=True):
        assert f">{name.partition(' (')[0]}{times if data['kind'] == 'stack' else ''}<" in drawn
    assert f">fusion block{'s' if depth > 1 else ''}, {6 * depth} linear weights<" in drawn
    assert f">{depth * 512:,} elements, all prunable<" in drawn
    assert ">16 elements, left dense<" in drawn
    assert {">vision<", ">text<", ">fusion<", ">filled: repeated blocks<"} <= set(re.findall(r">[^<>]+<", drawn))


def svg(graph: nx.DiGraph) -> str:
    buffer = io.BytesIO()
    plot_regions(graph, buffer, title="Model", format="svg")
    return buffer.getvalue().decode()


def node(kind: str, region: str = "vision", blocks: int = 0, weights: int = 0) -> dict[str, object]:
    return {"kind": kind, "region": region, "blocks": blocks, "layers": 1, "weights": weights, "pruned": 0}


def test_outputs_that_hang_alike_and_chains_of_one_module_are_one_box() -> None:
    graph = nx.DiGraph()
    graph.add_node("image", **node("input"))
    graph.add_node("tower (vision)", **node("stack", blocks=3, weights=9))
    graph.add_node("model.merger.0", **node("head", weights=4))
    graph.add_node("model.merger.2", **node("head", weights=5))
    graph.add_node("other", **node("head"))
    for name in ("one", "two", "three"):
        graph.add_node(name, **node("output", ""))
    graph.add_edges_from(
        [
            ("image", "tower (vision)"),
            ("tower (vision)", "model.merger.0"),
            ("model.merger.0", "model.merger.2"),
            ("model.merger.2", "other"),
            *(("other", name) for name in ("one", "two")),
            ("tower (vision)", "three"),
        ]
    )
    folded, boxes = fold(graph)
    assert {tuple(box.names) for box in boxes.values()} == {
        ("image",), ("tower (vision)",), ("model.merger.0", "model.merger.2"), ("other",), ("one", "two"), ("three",)
    }  # fmt: skip
    assert boxes["model.merger.0"].data["weights"] == 9
    assert ("model.merger.0", "other") in folded.edges
    assert graph.number_of_nodes() == 8, "the given graph is not touched"


@pytest.mark.parametrize("seed", range(6))
def test_boxes_do_not_overlap_and_no_arrow_runs_through_one(seed: int) -> None:
    graph = nx.gn_graph(14, seed=seed).reverse()
    graph.add_edges_from((source, target) for source in range(4) for target in range(8, 12) if source != target)
    graph = nx.relabel_nodes(nx.DiGraph((a, b) for a, b in graph.edges if a < b or seed > 3), str)
    layout = lay_out(graph, width=3.0, lane=0.3, gap=0.5)
    rows: dict[int, list[float]] = {}
    for x, depth in layout.places.values():
        rows.setdefault(depth, []).append(x)
    for places in rows.values():
        assert all(other - one >= 3.5 - 1e-9 for one, other in pairwise(sorted(places)))
    assert set(layout.routes) | set(layout.level) == set(graph.edges)
    for route in layout.routes.values():
        assert [depth for _, depth in route] == list(range(route[0][1], route[-1][1] + 1))
        for x, depth in route[1:-1]:
            assert min(abs(x - place) for place in rows[depth]) >= 1.5 + 0.15


def test_a_layout_of_a_chain_is_straight_and_of_a_cycle_is_level() -> None:
    chain = nx.path_graph(5, create_using=nx.DiGraph)
    layout = lay_out(nx.relabel_nodes(chain, str), width=3.0, lane=0.3, gap=0.5)
    assert len({x for x, _ in layout.places.values()}) == 1
    cycle = lay_out(nx.DiGraph([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]), width=3.0, lane=0.3, gap=0.5)
    assert cycle.places["b"][1] == cycle.places["c"][1] == 1
    assert set(cycle.level) == {("b", "c"), ("c", "b")}
