"""Submodules that are linear maps (low-rank additions, scaled projections) are parts of a layer, not layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile

D = 16


class LowRank(nn.Module):
    """A linear layer with a low-rank addition."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base(x) + 2.0 * self.up(F.dropout(self.down(x), training=self.training))
        return added


class Layer(nn.Module):
    """Cross-attention and an MLP, all of wrapped linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (LowRank(D, D) for _ in range(4))
        self.up, self.down = LowRank(D, 2 * D), LowRank(2 * D, D)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (2, -1)).transpose(1, 2)  # type: ignore[no-untyped-call, no-any-return]

        seen = F.scaled_dot_product_attention(heads(self.q(x)), heads(self.k(context)), heads(self.v(context)))
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(x)))
        return out


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lift = nn.Embedding(20, D), nn.Linear(12, D)
        self.see = nn.ModuleList(Layer() for _ in range(2))
        self.join = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        seen, text = self.lift(image), self.words(ids)
        for layer in self.see:
            seen = layer(seen, seen)
        for layer in self.join:
            text = layer(text, seen)
        return text  # type: ignore[no-any-return]


def test_low_rank_additions_belong_to_the_layer_that_they_lie_in() -> None:
    torch.manual_seed(0)
    inputs = {"image": torch.randn(2, 4, 12), "ids": torch.randint(0, 20, (2, 5))}
    regions = mfcompile.infer_regions(mfcompile.capture(Adapted().eval(), inputs))
    found = {fqn: {use.block for use in uses} for fqn, uses in regions.evidence.items() if fqn != "lift.weight"}
    assert found == {fqn: {".".join(fqn.split(".")[:2])} for fqn in found}
    assert {region for fqn, region in regions.weights.items() if fqn.startswith("join.")} == {"fusion"}
    assert {region for fqn, region in regions.weights.items() if fqn.startswith("see.")} == {"vision"}
    assert len(found) == 4 * 6 * 3
