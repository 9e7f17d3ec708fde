"""Masks applied to graphs and modules: the same numbers bit for bit, trainable, and gone when stripped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.frontends.recorder import replay
from mfcompile.graph import module_stack, tensor_values
from mfcompile.inputs import output_tensors
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.base import run_transform
from mfcompile.passes.masking import ApplyMasks, mask_module, mask_weight, masked_parameters, strip
from tests.models import TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics


@cache
def vlm_masks() -> MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics())


def filled(masks: MaskSet, value: bool) -> MaskSet:
    return MaskSet({name: PackedMask.pack(torch.full(mask.shape, value)) for name, mask in masks.packed.items()})


def zeroed(model: nn.Module, masks: MaskSet) -> nn.Module:
    """The plain oracle: zeros written into a deep copy."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_parameter(name)[~mask] = 0.0
    return plain


def outputs(model: nn.Module, mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode) -> list[Tensor]:
    with mode():
        return list(output_tensors(model(**vlm_batch())).values())


def from_graph(captured: mfcompile.CapturedGraph) -> list[Tensor]:
    return list(replay(captured.graph_module, captured.example_inputs))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_graph_module_and_zeroed_weights_are_equal_bit_for_bit() -> None:
    expected = outputs(zeroed(tiny_vlm(), vlm_masks()))
    assert_equal(from_graph(mfcompile.apply_masks(vlm_captured(), vlm_masks())), expected)
    assert_equal(outputs(mask_module(tiny_vlm(), vlm_masks())), expected)
    assert not torch.equal(expected[0], outputs(tiny_vlm())[0])


def test_masks_that_keep_everything_change_no_bit() -> None:
    masks = filled(vlm_masks(), True)
    assert_equal(from_graph(mfcompile.apply_masks(vlm_captured(), masks)), outputs(tiny_vlm()))
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        assert_equal(outputs(mask_module(tiny_vlm(), masks), mode), outputs(tiny_vlm(), mode))
    frozen = tiny_vlm().requires_grad_(False)
    assert_equal(outputs(mask_module(frozen, masks)), outputs(frozen))


def test_a_mask_that_keeps_nothing_leaves_the_bias() -> None:
    model, image = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    masks = MaskSet({"0.weight": PackedMask.pack(torch.zeros(3, 4, dtype=torch.bool))})
    captured = mfcompile.capture(model, image)
    bias = model.get_parameter("0.bias").detach().expand(2, 3)
    assert_equal([*from_graph(mfcompile.apply_masks(captured, masks)), mask_module(model, masks)(image).detach()], [bias, bias])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_masked_weight_keeps_its_dtype_and_masks_nan(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 1] = float("nan")
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 1] = False
    masks = MaskSet({"0.weight": PackedMask.pack(mask)})
    image = torch.randn(2, 4).to(dtype)
    weight = mask_module(model, masks).get_submodule("0").weight
    assert isinstance(weight, Tensor)
    assert weight.dtype == dtype
    assert weight[0, 1] == 0
    assert not torch.signbit(weight[0, 1])
    captured = mfcompile.capture(model, image)
    assert torch.isfinite(from_graph(mfcompile.apply_masks(captured, masks))[0]).all()


def test_the_given_graph_and_module_stay_as_they_were() -> None:
    model = tiny_vlm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text, names = str(vlm_captured().graph), {name for name, _ in vlm_captured().graph_module.named_buffers()}
    classes = [type(item) for item in model.modules()]
    result = run_transform(ApplyMasks(vlm_masks()), vlm_captured())
    mask_module(model, vlm_masks())
    assert result.modified
    assert str(vlm_captured().graph) == text
    assert {name for name, _ in vlm_captured().graph_module.named_buffers()} == names
    assert [type(item) for item in model.modules()] == classes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_masked_weight_is_described_as_the_weight_was() -> None:
    pruned = mfcompile.apply_masks(vlm_captured(), vlm_masks())
    nodes = [node for node in pruned.graph.nodes if node.target is mask_weight]
    assert len(nodes) == len(vlm_masks())
    for node in nodes:
        weight = node.all_input_nodes[0]
        assert [value.shape for value in tensor_values(node)] == [vlm_masks()[pruned.parameter_nodes[weight.name]].shape]
        assert module_stack(node) == module_stack(weight) != ()


def test_no_masks_leave_the_graph_alone() -> None:
    assert not run_transform(ApplyMasks(MaskSet({})), vlm_captured()).modified


def test_weights_are_shared_with_the_dense_model() -> None:
    model = tiny_vlm()
    masked = mask_module(model, vlm_masks())
    for name, original, _ in masked_parameters(masked):
        assert original is model.get_parameter(name)
    assert {name for name, _, _ in masked_parameters(masked)} == set(vlm_masks())
    captured = mfcompile.capture(model, vlm_batch())
    pruned = mfcompile.apply_masks(captured, vlm_masks())
    assert pruned.graph_module.get_parameter("head.weight") is model.head.weight


def test_the_masked_module_is_of_the_users_class() -> None:
    masked = mask_module(tiny_vlm(), vlm_masks())
    assert type(masked) is type(tiny_vlm())
    assert isinstance(masked.get_submodule("text.0.up"), nn.Linear)
    assert torch.equal(masked.get_submodule("text.0.up").weight == 0, ~vlm_masks()["text.0.up.weight"])  # type: ignore[arg-type]


def test_no_gradient_reaches_pruned_places() -> None:
    masked = mask_module(tiny_vlm(), vlm_masks()).train()
    sum(item.square().sum() for item in output_tensors(masked(**vlm_batch())).values()).backward()  # type: ignore[union-attr]
    for name, original, mask in masked_parameters(masked):
        assert original.grad is not None, name
        assert not original.grad[~mask].any(), name
        assert original.grad[mask].any(), name


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_momentum_and_weight_decay_do_not_bring_weights_back(kind: str) -> None:
    masked = mask_module(tiny_vlm(), vlm_masks()).train()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(masked.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)
        if kind == "sgd"
        else torch.optim.AdamW(masked.parameters(), lr=0.01, weight_decay=0.1)
    )
    before = {name: masked.get_submodule(name.rpartition(".")[0]).weight.detach().clone() for name in vlm_masks()}  # type: ignore[operator]
    for seed in range(3):
        optimizer.zero_grad()
        sum(item.square().mean() for item in output_tensors(masked(**vlm_batch(seed=seed))).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    for name, mask in vlm_masks().items():
        weight = masked.get_submodule(name.rpartition(".")[0]).weight
        assert isinstance(weight, Tensor)
        assert not weight[~mask].any(), name
        assert not torch.equal(weight[mask], before[name][mask]), name


def test_a_masked_module_can_be_copied_and_its_state_loaded() -> None:
    masked = mask_module(tiny_vlm(), vlm_masks())
    twin = copy.deepcopy(masked)
    assert_equal(outputs(twin), outputs(masked))
    fresh = mask_module(tiny_vlm(seed=1), vlm_masks())
    fresh.load_state_dict(masked.state_dict())
    assert_equal(outputs(fresh), outputs(masked))


def test_strip_bakes_zeros_and_leaves_the_dense_values() -> None:
    model = tiny_vlm()
    dense = model.text[0].up.weight.detach().clone()  # type: ignore[union-attr,operator]
    masked = mask_module(model, vlm_masks())
    expected = outputs(masked)
    stripped = strip(masked)
    assert stripped is masked
    assert list(stripped.state_dict()) == list(model.state_dict())
    assert [type(item) for item in stripped.modules()] == [type(item) for item in model.modules()]
    assert not list(masked_parameters(stripped))
    assert_equal(outputs(stripped), expected)
    assert torch.equal(model.text[0].up.weight, dense)  # type: ignore[union-attr,arg-type]
    assert all(torch.equal(stripped.get_parameter(name) == 0, ~mask) for name, mask in vlm_masks().items())


def test_strip_leaves_other_modules_alone() -> None:
    model = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    before = list(model.state_dict())
    assert list(strip(model).state_dict()) == before


def test_strip_keeps_what_is_frozen_frozen() -> None:
    model = tiny_vlm()
    model.text.requires_grad_(False)
    stripped = strip(mask_module(model, vlm_masks()))
    assert not stripped.get_parameter("text.0.up.weight").requires_grad
    assert stripped.get_parameter("fusion.0.up.weight").requires_grad


class Tied(nn.Module):
    """Two stacks of blocks that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = TwoLayers(), TwoLayers()
        self.two.blocks[1].up.weight = self.one.blocks[1].up.weight  # type: ignore[union-attr]

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(image))
        return result


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model, image = Tied(), torch.randn(2, 3, 4)
    captured = mfcompile.capture(model, image)
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, mfcompile.calibrate(captured, regions=regions))
    assert "one.blocks.1.up.weight" in masks
    assert "two.blocks.1.up.weight" not in masks
    masked = mask_module(model, masks)
    names = [name for name, _, _ in masked_parameters(masked)]
    assert {"one.blocks.1.up.weight", "two.blocks.1.up.weight"} < set(names)
    assert len(list(masked.parameters())) == len(list(model.parameters()))
    expected = zeroed(model, masks)
    with torch.inference_mode():
        assert torch.equal(masked(image), expected(image))
        assert torch.equal(from_graph(mfcompile.apply_masks(captured, masks))[0], expected(image))
    stripped = strip(masked)
    assert stripped.get_submodule("one.blocks.1.up").weight is stripped.get_submodule("two.blocks.1.up").weight


def test_masks_of_another_model_are_refused() -> None:
    unknown = MaskSet({"other.weight": PackedMask.pack(torch.ones(2, 2, dtype=torch.bool))})
    misshapen = MaskSet({"head.weight": PackedMask.pack(torch.ones(8, 2, dtype=torch.bool))})
    with pytest.raises(PreconditionError, match=r"the graph reads no weight called other\.weight: .* another model"):
        mfcompile.apply_masks(vlm_captured(), unknown)
    with pytest.raises(PreconditionError, match=r"the mask of head\.weight is \(8, 2\), the weight is \(2, 8\)"):
        mfcompile.apply_masks(vlm_captured(), misshapen)
    for masks in (unknown, misshapen):
        with pytest.raises(InputError, match="the model has no such weight: they belong to another model"):
            mask_module(tiny_vlm(), masks)


def test_a_model_that_cannot_be_copied_says_what_refused() -> None:
    model = TwoLayers()
    model.handle = (letter for letter in "")  # type: ignore[assignment]
    masks = MaskSet({"blocks.0.up.weight": PackedMask.pack(torch.ones(8, 4, dtype=torch.bool))})
    with pytest.raises(InputError, match=r"TwoLayers cannot be copied \(TypeError: .*deepcopy refuses"):
        mask_module(model, masks)


def test_a_weight_that_is_still_read_unmasked_is_a_broken_postcondition() -> None:
    result = run_transform(ApplyMasks(vlm_masks()), vlm_captured())
    with pytest.raises(PostconditionError, match="is still read unmasked, by"):
        ApplyMasks(vlm_masks()).ensures(vlm_captured(), replace(result, graph=vlm_captured()))
