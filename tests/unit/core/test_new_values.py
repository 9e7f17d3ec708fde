"""New values of kept weights: in the set of masks, in its file, and in the model that they are put into."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.masks import MaskSet
from mfcompile.passes.weight_values import set_values
from tests.models import tiny_vlm, vlm_batch

NAMES = ("text.0.up.weight", "fusion.1.cross.key.weight")


def pruned(dtype: torch.dtype = torch.float32) -> tuple[mfcompile.CapturedGraph, MaskSet]:
    """A captured model of its own, and masks with new values of two weights."""
    captured = mfcompile.capture(
        tiny_vlm().to(dtype), {k: v.to(dtype) if v.is_floating_point() else v for k, v in vlm_batch().items()}
    )
    masks = mfcompile.select_masks(captured, mfcompile.infer_regions(captured), criterion="magnitude", sparsity=0.5)
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(masks.packed[name].kept_count, generator=generator).to(dtype) for name in NAMES}
    return captured, replace(masks, new_values=values)


def expected(weight: Tensor, masks: MaskSet, name: str) -> Tensor:
    """Kept places filled one by one, in the order of the stored parameter."""
    filled, values = weight.detach().clone().reshape(-1), iter(masks.new_values[name].tolist())
    for index, kept in enumerate(masks[name].reshape(-1).tolist()):
        if kept:
            filled[index] = next(values)
    return filled.reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_come_back_from_a_file_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    _, masks = pruned(dtype)
    loaded = MaskSet.load(masks.save(tmp_path / "masks.safetensors"))
    assert loaded == masks
    assert loaded.digest() == masks.digest()
    assert list(loaded.new_values) == [name for name in masks if name in NAMES]
    for name in NAMES:
        assert loaded.new_values[name].dtype == dtype
        assert torch.equal(loaded.new_values[name], masks.new_values[name])


def test_files_say_that_they_hold_values(tmp_path: Path) -> None:
    _, masks = pruned()
    versions = []
    for index, chosen in enumerate((masks, replace(masks, new_values={}))):
        with safe_open(chosen.save(tmp_path / f"{index}.safetensors"), framework="pt") as file:
            versions.append(file.metadata()["format_version"])
    assert versions == ["2", "1"], "a reader of version 1 must not take masks for all there is"


def test_values_are_part_of_what_masks_are() -> None:
    _, masks = pruned()
    name = NAMES[0]
    changed = masks.new_values[name].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(torch.inf))
    others = [
        replace(masks, new_values={}),
        replace(masks, new_values={name: masks.new_values[name]}),
        replace(masks, new_values=dict(masks.new_values) | {name: changed}),
        replace(masks, new_values=dict(masks.new_values) | {name: masks.new_values[name].double()}),
    ]
    assert len({masks.digest(), *(other.digest() for other in others)}) == 5
    assert all(other != masks for other in others)


def test_a_file_with_too_few_values_is_damaged(tmp_path: Path) -> None:
    _, masks = pruned()
    short = replace(masks, new_values={NAMES[0]: masks.new_values[NAMES[0]][:-1]})
    path = short.save(tmp_path / "masks.safetensors")
    kept = masks.packed[NAMES[0]].kept_count
    with pytest.raises(
        InputError, match=rf"text\.0\.up\.weight has {kept - 1} new values for {kept} kept weights; it is damaged"
    ):
        MaskSet.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refitted_parameters_come_back_and_are_part_of_what_masks_are(tmp_path: Path, dtype: torch.dtype) -> None:
    _, plain = pruned()
    refitted = {"a.bias": torch.randn(3).to(dtype), "b.c.weight": torch.randn(2, 5).mT.to(dtype)}
    masks = replace(plain, refitted=refitted)
    path = masks.save(tmp_path / "masks.safetensors")
    loaded = MaskSet.load(path)
    assert list(loaded.refitted) == list(refitted)
    for name, values in refitted.items():
        assert loaded.refitted[name].dtype == dtype
        assert torch.equal(loaded.refitted[name], values)
    assert loaded == masks != plain
    assert loaded.mask_digest() == plain.mask_digest()
    other = replace(masks, refitted={**refitted, "a.bias": refitted["a.bias"] + 1})
    assert (
        len({masks.digest(), plain.digest(), other.digest(), replace(masks, refitted={"a.bias": refitted["a.bias"]}).digest()})
        == 4
    )
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format_version"] == "3", "a reader of version 2 must not take the masks for all there is"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_places_hold_the_new_values_and_pruned_ones_what_they_held(dtype: torch.dtype) -> None:
    captured, masks = pruned(dtype)
    for name in NAMES:
        weight = captured.parameter(name)
        before = weight.detach().clone()
        assert torch.equal(masks.updated_weight(name, weight), expected(weight, masks, name))
        assert torch.equal(masks.updated_weight(name, weight.T.contiguous().T), expected(weight, masks, name))
        assert torch.equal(weight, before)


def test_a_model_gets_values_of_its_own_and_shares_the_rest() -> None:
    captured, masks = pruned()
    before = {name: (item.detach().clone(), item) for name, item in captured.module.named_parameters()}
    updated = set_values(captured, masks)
    assert updated.exported is None
    assert type(updated.module) is type(captured.module)
    assert updated.module is not captured.module
    for name, parameter in updated.module.named_parameters():
        values, original = before[name]
        assert torch.equal(original, values), "the user's model stays as it is"
        if name in NAMES:
            assert torch.equal(parameter, expected(values, masks, name))
            assert isinstance(parameter, nn.Parameter)
            assert parameter.requires_grad
        else:
            assert parameter is original
    inputs = vlm_batch((5, 6), seed=9)
    outputs, plain = updated.module(**inputs), captured.module(**inputs)
    from_graph = updated.graph_module(*inputs.values())
    assert not torch.equal(outputs["fused"], plain["fused"])
    assert torch.equal(outputs["image"], plain["image"])
    for one, two in zip(outputs.values(), from_graph, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert torch.equal(captured.module(**inputs)["fused"], plain["fused"])


def test_masks_and_values_are_in_force_together() -> None:
    captured, masks = pruned()
    applied = mfcompile.apply_masks(captured, masks)
    by_hand = tiny_vlm()
    with torch.no_grad():
        for name, mask in masks.items():
            weight = by_hand.get_parameter(name)
            weight.copy_((expected(weight, masks, name) if name in NAMES else weight) * mask)
    inputs = vlm_batch((5, 6), seed=9)
    for one, two in zip(by_hand(**inputs).values(), applied.graph_module(*inputs.values()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_without_values_nothing_is_copied() -> None:
    captured, masks = pruned()
    assert set_values(captured, replace(masks, new_values={})) is captured


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        second = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        second[0].weight = first[0].weight
        self.blocks = nn.ModuleList([first, second])

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            image = image + block(image)
        return image


def test_a_tied_weight_is_new_under_both_names() -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    captured = mfcompile.capture(model, {"image": torch.randn(2, 3, 4)})
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    masks = mfcompile.select_masks(captured, regions, criterion="magnitude", sparsity=0.5)
    assert "blocks.1.0.weight" not in masks
    masks = replace(masks, new_values={"blocks.0.0.weight": torch.ones(masks.packed["blocks.0.0.weight"].kept_count)})
    updated = set_values(captured, masks)
    assert isinstance(updated.module, Tied)
    assert updated.module.get_parameter("blocks.1.0.weight") is updated.module.get_parameter("blocks.0.0.weight")
    assert model.get_parameter("blocks.1.0.weight") is model.get_parameter("blocks.0.0.weight")
    image = torch.randn(2, 3, 4)
    torch.testing.assert_close(updated.graph_module(image)[0], updated.module(image), rtol=1e-6, atol=1e-6)
    assert not torch.equal(updated.module(image), model(image))


def test_a_model_that_refuses_copies_is_named() -> None:
    class Stubborn(Tied):
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise RuntimeError("no copies")

    torch.manual_seed(0)
    captured = mfcompile.capture(Tied().eval(), {"image": torch.randn(2, 3, 4)})
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    masks = mfcompile.select_masks(captured, regions, criterion="magnitude", sparsity=0.5)
    masks = replace(masks, new_values={"blocks.0.0.weight": torch.ones(masks.packed["blocks.0.0.weight"].kept_count)})
    with pytest.raises(
        InputError, match=r"Stubborn cannot be copied \(RuntimeError: no copies\): updated weights are put into"
    ):
        set_values(replace(captured, module=Stubborn()), masks)


def test_masks_have_a_digest_of_their_own_that_new_values_do_not_move() -> None:
    _, masks = pruned()
    plain = replace(masks, new_values={})
    assert masks.digest() != plain.digest()
    assert masks.mask_digest() == plain.mask_digest() == plain.digest()
