"""Errors of outputs against their definition in NumPy; padding, fillers, and models that cannot be compared."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError
from mfcompile.inputs import normalize_inputs
from mfcompile.passes.masking import mask_module
from mfcompile.passes.output_error import DenseOutputs
from mfcompile.passes.random_numbers import seeded
from tests.models import Batch, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics

BATCHES = [vlm_batch((6, 3, 5), seed=8), vlm_batch((2, 4, 6, 6), seed=9)]


def pruned_vlm() -> nn.Module:
    masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), sparsity=0.5)
    return mask_module(vlm_captured().module, masks)


def dense_vlm(batches: list[Batch] = BATCHES, **options: Any) -> DenseOutputs:
    inputs = [normalize_inputs(vlm_captured().module, batch) for batch in batches]
    return DenseOutputs(vlm_captured(), vlm_regions(), inputs, **options)


def by_hand(name: str) -> float:
    """||pruned - dense|| / ||dense|| over both batches; tokens of text that are padding are left out."""
    difference = norm = 0.0
    with torch.no_grad():
        for batch in BATCHES:
            one, other = (module(**batch)[name].double().numpy() for module in (tiny_vlm(), pruned_vlm()))
            if name in ("text", "fused"):
                keep = batch["attention_mask"].numpy() == 1
                one, other = one[keep], other[keep]
            difference += np.sum((other - one) ** 2)
            norm += np.sum(one**2)
    return float(np.sqrt(difference / norm))


def test_errors_are_relative_norms_over_all_batches_without_padding() -> None:
    dense = dense_vlm()
    found = dense.errors(pruned_vlm())
    expected = {name: by_hand(name) for name in ("image", "text", "fused", "match")}
    assert found.by_output == pytest.approx(expected, rel=1e-6)
    assert found.overall == pytest.approx(np.mean(list(expected.values())), rel=1e-6)
    assert min(expected.values()) > 0.01
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in BATCHES)
    outputs = {item.name: item for item in dense.outputs}
    assert outputs["text"].left_out == outputs["fused"].left_out == 8 * padding > 0
    assert outputs["image"].left_out == outputs["match"].left_out == 0
    assert outputs["match"].elements == 2 * 7


def test_outputs_that_are_not_kept_are_computed_again() -> None:
    assert dense_vlm(most_kept_bytes=0).errors(pruned_vlm()) == dense_vlm().errors(pruned_vlm())


def test_the_dense_model_has_no_error_and_is_left_alone() -> None:
    module = vlm_captured().module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert set(dense_vlm().errors(module).by_output.values()) == {0.0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


class Odd(TwoLayers):
    """Outputs of every kind: classes, a filled-in matrix, a constant zero, a complex number, a count of its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__(width=8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        self.calls += 1
        states = super().forward(image)
        filled = states.masked_fill(image > 1, float("-inf")).masked_fill(image < -1, torch.finfo(states.dtype).min)
        return {
            "states": states,
            "classes": states.argmax(-1),
            "filled": filled,
            "zero": states * 0,
            "complex": torch.complex(states, 2 * states),
            "noisy": states + 0.1 * torch.randn(states.shape),
            "calls": self.calls.expand(3),
        }


def odd() -> tuple[DenseOutputs, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, image = Odd().eval(), torch.randn(4, 6, 8)
    captured = mfcompile.capture(model, (image,))
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, sparsity=0.5, criterion="magnitude")
    dense = DenseOutputs(captured, regions, [normalize_inputs(model, (image,))], seed=3)
    return dense, mask_module(model, masks), image


def test_outputs_of_every_kind() -> None:
    dense, pruned, image = odd()
    kinds = {item.name: item.kind for item in dense.outputs}
    assert kinds == {"states": "float", "filled": "float", "complex": "float", "noisy": "float", "classes": "integer",
                     "calls": "integer"}  # fmt: skip
    assert [item.subject for item in dense.ignored] == ["zero"]
    found = dense.errors(pruned).by_output
    model = Odd()
    with seeded(3, model), torch.no_grad():
        torch.manual_seed(0)
        model = Odd().eval()
        one, other = TwoLayers.forward(model, image).double(), TwoLayers.forward(pruned, image).double()  # type: ignore[arg-type]
    assert found["states"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-5)
    assert found["complex"] == pytest.approx(found["states"], rel=1e-6)
    keep = image.abs() <= 1
    assert found["filled"] == pytest.approx(float((one - other)[keep].norm() / one[keep].norm()), rel=1e-5)
    assert found["classes"] == pytest.approx(float((one.argmax(-1) != other.argmax(-1)).double().mean()))
    assert 0 < found["classes"] < 1
    assert found["noisy"] < 1.1 * found["states"], "both models draw the same numbers"
    assert found["calls"] == 0, "what a run writes is put back"


def test_what_is_not_finite_or_of_other_sizes_is_infinite() -> None:
    dense, pruned, _ = odd()
    broken = nn.Module()

    def forward(image: Tensor) -> dict[str, Tensor]:
        outputs = pruned(image)
        outputs["states"][0, 0, 0] = float("nan")
        return {**outputs, "classes": outputs["classes"][:2]}

    broken.forward = forward
    found = dense.errors(broken)
    assert found.by_output["states"] == found.by_output["classes"] == float("inf")
    assert found.overall == float("inf")
    assert np.isfinite(found.by_output["complex"])


def test_without_a_float_output_differences_are_counted() -> None:
    class Classes(TwoLayers):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image).argmax(-1)

    torch.manual_seed(1)
    model, image = Classes(8).eval(), torch.randn(64, 8)
    captured = mfcompile.capture(model, (image,))
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, sparsity=0.9, criterion="magnitude")
    pruned = mask_module(model, masks)
    found = DenseOutputs(captured, regions, [normalize_inputs(model, (image,))]).errors(pruned)
    with torch.no_grad():
        assert found.overall == pytest.approx(float((model(image) != pruned(image)).double().mean())) != 0


def test_a_model_that_gives_nothing_or_fails_is_refused() -> None:
    dense = odd()[0]
    with pytest.raises(CalibrationError, match=r"pruned model raised RuntimeError.*\(4, 6, 8\)"):
        dense.errors(nn.Conv2d(1, 1, 1))
    captured = vlm_captured()
    zero = replace(captured, module=_Zero())
    inputs = [normalize_inputs(captured.module, BATCHES[0])]
    with pytest.raises(CalibrationError, match="gives no output that pruned models could be compared by"):
        DenseOutputs(zero, vlm_regions(), inputs)


class _Zero(nn.Module):
    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return pixel_values * 0


def test_seeds_are_put_back() -> None:
    model = TwoLayers()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, model):
        inside = torch.rand(3), float(np.random.rand())
    with seeded(1, model):
        assert (torch.equal(torch.rand(3), inside[0]), float(np.random.rand())) == (True, inside[1])
    assert torch.equal(torch.rand(3), expected)
