"""Weights that are multiplied, but not as those of a linear layer, are listed with their reason and their region."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.errors import InputError


class Words(nn.Module):
    """A text model around a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), layer
        self.stack = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.layer(self.table(input_ids))
        states = states[0] if isinstance(states, tuple) else states
        for layer in self.stack:
            states = layer(states)
        return states  # type: ignore[no-any-return]


class Standardised(nn.Linear):
    """Multiplies by its weight minus the mean of each row."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def regions_of(layer: nn.Module) -> mfcompile.RegionMap:
    torch.manual_seed(0)
    return mfcompile.infer_regions(mfcompile.capture(Words(layer).eval(), {"input_ids": torch.randint(0, 20, (2, 5))}))


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True), "lstm"),
        (nn.GRU(8, 6, batch_first=True), "gru"),
        (nn.RNN(8, 6, batch_first=True), "rnn_tanh"),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_weights_of_recurrent_layers_are_listed(layer: nn.Module, operator: str) -> None:
    regions = regions_of(layer)
    expected = {f"layer.{name}" for name, parameter in layer.named_parameters() if parameter.ndim == 2}
    found = {site.fqn: site for site in regions.skipped_sites if site.fqn.startswith("layer.")}
    assert set(found) == expected
    assert {site.skipped for site in found.values()} == {
        f"not a linear weight: a recurrent operator ({operator}) multiplies it at every step"
    }
    assert {site.region for site in found.values()} == {"text"}
    assert len(regions.pruned_sites) == 4


def test_a_recurrent_weight_is_refused_as_a_target() -> None:
    captured = mfcompile.capture(Words(nn.GRU(8, 6, batch_first=True)).eval(), {"input_ids": torch.randint(0, 20, (2, 5))})
    with pytest.raises(InputError, match="recurrent operator"):
        mfcompile.infer_regions(captured, targets=["layer.weight_hh_l0"])


def test_a_weight_whose_values_are_changed_first_has_a_region_and_a_reason() -> None:
    (site,) = [site for site in regions_of(Standardised(8, 6)).sites if site.fqn == "layer.weight"]
    assert (site.region, site.skipped) == ("text", "its values are changed by sub before linear multiplies them")


class Frozen(nn.Module):
    """Multiplies by a buffer, which is no parameter of any optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.get_buffer("weight"))


def test_a_buffer_that_multiplies_is_said_and_stays() -> None:
    regions = regions_of(Frozen())
    assert "layer.weight" not in {site.fqn for site in regions.sites}
    assert [item.reason for item in regions.diagnostics if item.subject == "layer.weight"] == [
        "a buffer, no parameter: it stays as it is"
    ]
    assert len(regions.pruned_sites) == 4
