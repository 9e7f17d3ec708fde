"""verify_masks counts what is there, and names what should not be."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import mfcompile
from tests.masked_models import masked, small, small_masks, zeroed


def test_masked_stripped_and_reloaded_modules_are_counted_alike(tmp_path: Path) -> None:
    path = small_masks().save(tmp_path / "masks.safetensors")
    expected = mfcompile.verify_masks(masked())
    assert expected.pruned_count == small_masks().weight_count - small_masks().kept_count
    assert expected.kept_count == small_masks().kept_count
    assert expected.nonzero_count == 0
    assert expected.sparsity == pytest.approx(1 - small_masks().kept_count / small_masks().weight_count)
    stripped = mfcompile.strip(masked())
    for module, masks in ((masked(), path), (stripped, small_masks()), (zeroed(small(), small_masks()), str(path))):
        assert mfcompile.verify_masks(module, masks) == expected
    assert mfcompile.verify_masks(nn.DataParallel(masked())) == expected
    assert str(expected) == (
        f"{expected.pruned_count:,} of {expected.pruned_count:,} pruned places hold zero, in 4 weights of sparsity "
        f"{expected.sparsity:.4f}"
    )


def test_pruned_places_that_hold_something_are_named() -> None:
    plain = zeroed(small(), small_masks())
    with torch.no_grad():
        weight, mask = plain.get_parameter("up.weight"), small_masks()["up.weight"]
        place = (~mask).nonzero()[:2]
        weight[place[0, 0], place[0, 1]] = -0.25
        weight[place[1, 0], place[1, 1]] = float("nan")
        plain.get_parameter("down.weight")[~small_masks()["down.weight"]] = 1e-30
        kept = small_masks()["first.weight"].nonzero()[0]
        plain.get_parameter("first.weight")[kept[0], kept[1]] = 0.0
    down = int((~small_masks()["down.weight"]).sum())
    message = (
        rf"{down + 2} of \d+ pruned places are not zero, in 2 of 4 weights "
        rf"\(down\.weight: {down} of {down}, up to 1e-30; up\.weight: 2 of"
    )
    with pytest.raises(mfcompile.MaskError, match=message):
        mfcompile.verify_masks(plain, small_masks())
    only_first = mfcompile.MaskSet({"first.weight": small_masks().packed["first.weight"]})
    assert mfcompile.verify_masks(plain, only_first).weights[0].kept_zero_count == 1


def test_a_minus_zero_is_zero() -> None:
    plain = zeroed(small(), small_masks())
    with torch.no_grad():
        plain.get_parameter("up.weight")[~small_masks()["up.weight"]] = -0.0
    assert mfcompile.verify_masks(plain, small_masks()).nonzero_count == 0


def test_without_masks_there_is_nothing_to_check() -> None:
    with pytest.raises(mfcompile.InputError, match="Small has no masks in force, so there is nothing to check"):
        mfcompile.verify_masks(small())


def test_masks_of_another_model_are_refused() -> None:
    packed = small_masks().packed
    with pytest.raises(mfcompile.InputError, match=r"no weight called ups\.weight, .* Nearest names: up\.weight"):
        mfcompile.verify_masks(small(), mfcompile.MaskSet({"ups.weight": packed["up.weight"]}))
    with pytest.raises(mfcompile.InputError, match=r"down\.weight is \(6, 16\) in the model and \(16, 32\) in the masks"):
        mfcompile.verify_masks(small(), mfcompile.MaskSet({"down.weight": packed["up.weight"]}))


def test_adapters_of_peft_on_masked_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class BaseTunerLayer:
        """What all adapter layers of peft derive from."""

    class Adapter(nn.Module, BaseTunerLayer):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

    module = types.ModuleType("peft.tuners.tuners_utils")
    module.BaseTunerLayer = BaseTunerLayer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", module)
    model = masked()
    model.up = Adapter(model.get_submodule("up"))
    with pytest.raises(mfcompile.MaskError, match=r"adapters of peft sit on masked layers \(up\).*mfcompile\.add_lora"):
        mfcompile.verify_masks(model)
    model = masked()
    model.head = Adapter(model.get_submodule("head"))  # a dense head may have one
    assert mfcompile.verify_masks(model).nonzero_count == 0
