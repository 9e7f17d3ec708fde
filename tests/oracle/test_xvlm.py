"""The rebuilt XVLM computes the recorded activations, so calibrating it is calibrating the authors' model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors

from tests.oracle import recorded

VALUES_PER_ACTIVATION = 64
# The recording ran one thread and its own attention kernel: sums of at most 64 terms in another order.
RTOL_OF_LARGEST = 2e-6


def test_parameter_names_are_those_of_the_recorded_weights() -> None:
    module = recorded.model()
    stored = load_tensors(recorded.DATA / "model.safetensors")
    assert set(module.state_dict()) == set(stored)
    names = {layer.name for layer in recorded.layers()}
    assert [name for name, _ in module.named_parameters() if name in names] == [layer.name for layer in recorded.layers()]


@pytest.mark.parametrize("call", [0, 1], ids=["general", "region"])
@pytest.mark.parametrize("iteration", range(recorded.ITERATIONS))
def test_linear_inputs_equal_the_recorded_activations(iteration: int, call: int) -> None:
    batch = (recorded.general_batches, recorded.region_batches)[call]()[iteration]
    (found,) = recorded.linear_inputs(recorded.model(), [batch])
    stored = load_file(recorded.DATA / "activations.safetensors")
    alias = json.loads((recorded.DATA / "activations_alias.json").read_text(encoding="utf-8"))
    assert len(found) == 80
    for name, activation in found.items():
        key = f"{iteration}.{call}.{name}"
        expected = stored[alias.get(key, key)]
        places = np.linspace(0, activation.size - 1, VALUES_PER_ACTIVATION).astype(np.int64)
        atol = RTOL_OF_LARGEST * float(np.abs(activation).max())
        np.testing.assert_allclose(activation.reshape(-1)[places], expected, rtol=0, atol=atol, err_msg=key)


def test_extra_padding_leaves_the_tokens_as_they_are() -> None:
    batch = recorded.general_batches()[0]
    padded = dict(batch)
    for name in ("text_ids", "text_atts"):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 5))
    with torch.no_grad():
        expected = recorded.model()(**batch)
        found = recorded.model()(**padded)[:, : expected.shape[1]]
    kept = batch["text_atts"].bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_positions_from_the_mask_equal_positions_from_the_left_on_right_padded_text() -> None:
    batch = recorded.general_batches()[1]
    kept = batch["text_atts"].bool()
    with torch.no_grad():
        expected = recorded.model()(**batch)[kept]
        found = recorded.model(positions_from_mask=True)(**batch)[kept]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
