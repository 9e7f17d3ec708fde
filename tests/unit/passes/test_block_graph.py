"""The quotient graph: a few nodes for any depth, with the flow of the model between them."""

from __future__ import annotations

import io

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.passes.block_graph import block_graph
from mfcompile.region_plot import plot_regions
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
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.randint(0, 50, (2, 5))}
    captured = mfcompile.capture(Model(depth).eval(), inputs)
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
        "weights": depth * (4 * 64 + 2 * 128),
    }
    assert graph.nodes["head"]["kind"] == "head"


def test_the_picture_names_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = quotient(2)
    buffer = io.BytesIO()
    monkeypatch.setitem(STYLE, "svg.fonttype", "none")
    plot_regions(graph, buffer, title="Model", format="svg")
    drawn = buffer.getvalue().decode()
    assert [name for name in graph.nodes if f">{name.partition(' (')[0]}<" not in drawn] == []
    assert "fusion, 2 blocks" in drawn
