"""Padding is left out of the statistics exactly, wherever the text goes: the oracle runs every text on its own, unpadded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mfcompile
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.region import RegionMap
from mfcompile.statistics import CalibrationStatistics
from tests.zoo.handwritten import BATCH, CASES, Case

RTOL = 1e-4  # sums of squares in fp32, of activations that went through attentions of another length
WITH_TEXT = [name for name, case in CASES.items() if case.text]


def prepared(case: Case) -> tuple[CapturedGraph, RegionMap, ExampleInputs]:
    model = case.make()
    inputs = normalize_inputs(model, case.inputs(6))
    captured = mfcompile.capture(model, inputs)
    return captured, mfcompile.infer_regions(captured, modalities=case.modalities), inputs


def is_inverted(name: str) -> bool:
    return CASES[name].text[0][1] == "padding_mask"


def alone(case: Case, inputs: ExampleInputs, sample: int, inverted: bool) -> ExampleInputs:
    """One sample without its padding."""
    tensors = inputs.tensors()
    cuts: dict[str, Tensor] = {}
    for tokens, mask in case.text:
        kept = (tensors[mask][sample] != 0) != inverted
        cuts[tokens] = cuts[mask] = kept
    return inputs.map_tensors(
        lambda name, tensor: tensor[sample : sample + 1][:, cuts[name]] if name in cuts else tensor[sample : sample + 1]
    )


def padded(case: Case, inputs: ExampleInputs, side: str, inverted: bool, amount: int = 4) -> ExampleInputs:
    """More padding, at one side."""
    fill = {name: 0 for pair in case.text for name in pair} | {mask: int(inverted) for _, mask in case.text}

    def grow(name: str, tensor: Tensor) -> Tensor:
        if name not in fill:
            return tensor
        extra = torch.full((tensor.shape[0], amount), fill[name]).to(tensor.dtype)
        return torch.cat([tensor, extra] if side == "right" else [extra, tensor], dim=1)

    return inputs.map_tensors(grow)


def assert_equal(found: CalibrationStatistics, expected: CalibrationStatistics) -> None:
    for name, site in found.sites.items():
        assert site.token_count == expected.sites[name].token_count, name
        squares = expected.sites[name].sum_of_squares
        torch.testing.assert_close(site.sum_of_squares, squares, rtol=RTOL, atol=1e-6, msg=name)
    assert found.diagnostics == ()


@pytest.mark.parametrize("name", WITH_TEXT)
def test_statistics_are_those_of_texts_without_padding(name: str) -> None:
    case, inverted = CASES[name], is_inverted(name)
    captured, regions, inputs = prepared(case)
    singles: list[Any] = [alone(case, inputs, sample, inverted) for sample in range(BATCH)]
    expected = mfcompile.calibrate(captured, singles, regions=regions)
    assert_equal(mfcompile.calibrate(captured, [inputs], regions=regions), expected)
    for side in ("right", "left"):
        longer = padded(case, inputs, side, inverted)
        assert_equal(mfcompile.calibrate(captured, [longer], regions=regions), expected)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_graph_and_module_see_the_same_padding(name: str) -> None:
    captured, regions, inputs = prepared(CASES[name])
    if captured.baked_scalars:
        pytest.skip("the model reads numbers from its inputs: its graph is not run on batches")
    graph = mfcompile.calibrate(captured, [inputs], regions=regions, observe="graph")
    module = mfcompile.calibrate(captured, [inputs], regions=regions, observe="module")
    assert graph.padding_masks == module.padding_masks == tuple(mask for _, mask in CASES[name].text)
    assert_equal(graph, module)
