"""Equal magnitudes and equal scores: mfcompile against the reference, since the recording holds no ties."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import mfcompile
from tests.oracle import recorded, reference
from tests.oracle.reference import Rounding

STEP = 0.125  # a power of two: magnitudes are exact, 70 % of them are zero
SPARSITIES = (0.3, 0.63, 0.9)  # two cuts among the zeros, one among the other levels
GROUPS = {layer.name: layer.modality for layer in recorded.layers()}


@cache
def captured() -> mfcompile.CapturedGraph:
    model = recorded.model()
    with torch.no_grad():
        for layer in recorded.layers():
            weight = model.get_parameter(layer.name)
            weight.copy_((weight / STEP).round() * STEP)
    return mfcompile.capture(model, recorded.general_batches()[0])


@cache
def regions() -> mfcompile.RegionMap:
    return mfcompile.infer_regions(captured())


@cache
def statistics() -> mfcompile.CalibrationStatistics:
    return mfcompile.calibrate(captured(), recorded.general_batches(), regions=regions())


def weights() -> dict[str, reference.Array]:
    return {layer.name: captured().parameter(layer.name).detach().numpy() for layer in recorded.layers()}


@pytest.mark.parametrize("rounding", ["exact", "official"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_multiflow_breaks_ties_as_the_reference_does(sparsity: float, rounding: Rounding) -> None:
    masks = mfcompile.select_masks(captured(), regions(), statistics(), sparsity=sparsity, rounding=rounding)
    norms = {name: site.input_norm().numpy() for name, site in statistics().sites.items()}
    expected = reference.multiflow(weights(), norms, GROUPS, sparsity, rounding)
    assert recorded.differing_bits({name: mask.numpy() for name, mask in masks.items()}, expected) == {}


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_magnitude_breaks_ties_by_position(sparsity: float) -> None:
    masks = mfcompile.select_masks(
        captured(), regions(), None, sparsity=sparsity, criterion="magnitude", allocation="magnitude-global"
    )
    magnitudes = {name: np.abs(weight) for name, weight in weights().items()}
    expected = reference.threshold_group(magnitudes, sparsity, "exact")
    assert recorded.differing_bits({name: mask.numpy() for name, mask in masks.items()}, expected) == {}
    size = sum(weight.size for weight in magnitudes.values())
    assert masks.kept_count == size - int(sparsity * size)
