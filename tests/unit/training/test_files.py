"""Directories of pruned models: read back, trained on, written again."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mfcompile
from mfcompile.masked_weights import masks_of
from tests.masked_models import assert_pruned, batch, effective, masked, small, small_masks, train, zeroed
from tests.models import TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics


@cache
def saved_masks() -> mfcompile.MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)


def test_a_trained_module_is_saved_and_loaded_bit_for_bit_again_and_again(tmp_path: Path) -> None:
    model = masked()
    train(model, adamw(model))
    for turn in ("one", "two"):
        path = mfcompile.save(model, tmp_path / turn)
        assert sorted(item.name for item in path.iterdir()) == ["masks.safetensors", "model.safetensors"]
        assert set(load_file(path / "model.safetensors")) == set(small().state_dict()) - {"second.weight"}
        twin = mfcompile.load(path, model=small(seed=3))
        assert masks_of(twin) == small_masks()
        assert masks_of(twin).fingerprint == "of the dense one"
        assert torch.equal(twin.eval()(batch()[0]), model.eval()(batch()[0]))
        before = effective(twin, "up.weight").clone()
        train(twin.train(), adamw(twin))
        assert_pruned(twin)
        assert not torch.equal(effective(twin, "up.weight"), before)
        model = twin


def test_a_compiled_model_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    compiled = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), calibration=[vlm_batch(seed=1)])
    module = compiled.module.train()
    optimizer = adamw(module)
    for seed in range(2):
        optimizer.zero_grad()
        module(**vlm_batch(seed=seed))["match"].square().mean().backward()
        optimizer.step()
    path = compiled.save(tmp_path / "pruned", onnx=False)
    found = mfcompile.load(path, model=tiny_vlm(seed=5))
    with torch.inference_mode():
        assert torch.equal(found(**vlm_batch())["match"], module.eval()(**vlm_batch())["match"])
    assert masks_of(found) == compiled.masks
    assert masks_of(found).regions == compiled.masks.regions
    assert mfcompile.verify_masks(found).pruned_count == mfcompile.verify_masks(compiled.strip(), compiled.masks).pruned_count
    # Parameters that took the places of those that were captured are saved as well.
    module.load_state_dict({name: value + 1 for name, value in module.state_dict().items()}, assign=True)
    changed = mfcompile.load(compiled.save(tmp_path / "again", onnx=False), model=tiny_vlm())
    assert torch.equal(changed.get_parameter("head.bias"), module.get_parameter("head.bias"))


def test_new_values_are_those_of_the_pruning_and_weights_those_of_the_file(tmp_path: Path) -> None:
    values = torch.full((small_masks().packed["up.weight"].kept_count,), 0.5)
    masks = replace(small_masks(), new_values={"up.weight": values})
    dense = small()
    model = mfcompile.mask_module(dense, masks)
    assert effective(model, "up.weight")[masks["up.weight"]].tolist() == values.tolist()
    assert not (dense.up.weight == 0.5).any()
    train(model, adamw(model))
    path = mfcompile.save(model, tmp_path / "trained")
    masks.save(path / "masks.safetensors")  # as compiled.save does: masks as they were chosen, new values with them
    again = mfcompile.load(path, model=small())
    assert torch.equal(effective(again, "up.weight"), effective(model, "up.weight"))
    assert not masks_of(again).new_values


def test_adapters_are_saved_merged(tmp_path: Path) -> None:
    model = masked()
    mfcompile.add_lora(model, rank=2)
    train(model, adamw(model))
    again = mfcompile.load(mfcompile.save(model, tmp_path / "adapted"), model=small())
    assert torch.equal(again.eval()(batch()[0]), model.eval()(batch()[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    path = mfcompile.save(masked().to(dtype), tmp_path / "half")
    found = mfcompile.load(path, model=small().to(dtype))
    assert effective(found, "up.weight").dtype == dtype
    with pytest.raises(mfcompile.InputError, match=r"first\.bias is \(6,\) \w+16 in the file, \(6,\) float32 in the module"):
        mfcompile.load(path, model=small())


def test_what_does_not_match_is_said(tmp_path: Path) -> None:
    path = mfcompile.save(masked(), tmp_path / "pruned")
    other = small()
    other.extra = nn.Linear(2, 2, bias=False)
    other.head = nn.Linear(6, 7)
    del other.up.bias
    before = other.down.weight.detach().clone()
    with pytest.raises(mfcompile.InputError) as refusal:
        mfcompile.load(path, model=other)
    for part in (
        "do not fit Small",
        "head.bias is (5,) float32 in the file, (7,) float32 in the module",
        "not in the file: extra.weight",
        "not in the module: up.bias",
    ):
        assert part in str(refusal.value)
    assert torch.equal(other.down.weight, before)


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    path = mfcompile.save(masked(), tmp_path / "pruned")
    small_masks(seed=1).save(path / "masks.safetensors")
    with pytest.raises(mfcompile.MaskError, match=r"model\.safetensors does not belong to masks\.safetensors .* not zero"):
        mfcompile.load(path, model=small())
    (path / "report.json").write_text(json.dumps({"digest": small_masks().digest()}))
    with pytest.raises(mfcompile.InputError, match=r"report\.json is of other masks .* different runs"):
        mfcompile.load(path, model=small())


def test_shards_are_read(tmp_path: Path) -> None:
    path = mfcompile.save(masked(), tmp_path / "pruned")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    places = {}
    for index, name in enumerate(tensors):
        places[name] = f"model-{index % 2}.safetensors"
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert torch.equal(mfcompile.load(path, model=small()).eval()(batch()[0]), masked().eval()(batch()[0]))


def test_what_cannot_be_loaded_or_saved_is_refused(tmp_path: Path) -> None:
    path = mfcompile.save(masked(), tmp_path / "pruned")
    with pytest.raises(mfcompile.InputError, match=r"has no config\.json.*mfcompile\.load\(.*, model=YourModel\(\)\)"):
        mfcompile.load(path)
    with pytest.raises(mfcompile.InputError, match="there is no directory"):
        mfcompile.load(tmp_path / "nowhere", model=small())
    with pytest.raises(mfcompile.InputError, match="Small has masks in force already"):
        mfcompile.load(path, model=masked())
    with pytest.raises(mfcompile.InputError, match="is not empty"):
        mfcompile.save(masked(), path)
    with pytest.raises(mfcompile.InputError, match="Small has no masks in force: save a module without masks"):
        mfcompile.save(small(), tmp_path / "dense")
    (path / "model.safetensors").unlink()
    with pytest.raises(mfcompile.InputError, match=r"holds no model\.safetensors \(but masks\.safetensors\)"):
        mfcompile.load(path, model=small())


def test_masks_are_put_from_a_file_over_a_dense_model(tmp_path: Path) -> None:
    dense = small()
    model = mfcompile.mask_module(dense, small_masks().save(tmp_path / "masks.safetensors"))
    assert torch.equal(model.eval()(batch()[0]), zeroed(small(), small_masks()).eval()(batch()[0]))
    assert model.get_parameter("head.weight") is dense.head.weight
    with pytest.raises(mfcompile.InputError, match="has masks in force already"):
        mfcompile.mask_module(model, small_masks())


def test_what_was_trained_is_what_is_exported(tmp_path: Path) -> None:
    """Also with adapters that are not merged, and with parameters that took the places of those that were captured."""
    torch.manual_seed(0)
    dense, images = TwoLayers(), torch.randn(2, 3, 4)
    untrained = copy.deepcopy(dense)
    compiled = mfcompile.compile_pruned(dense, images, sparsity=0.5)
    state = {name: value * 1.5 for name, value in compiled.module.state_dict().items()}
    compiled.module.load_state_dict(state, assign=True)
    mfcompile.add_lora(compiled.module, rank=1)
    with torch.no_grad():
        for name, parameter in compiled.module.named_parameters():
            if name.endswith(".0.up"):
                parameter.fill_(0.25)
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert compiled.verify(artifact).passed
    plain = mfcompile.strip(copy.deepcopy(compiled.module))
    assert mfcompile.verify_masks(plain, compiled.masks).nonzero_count == 0
    session = onnxruntime.InferenceSession(artifact.path)
    found = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
    torch.testing.assert_close(found, plain(images).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, untrained(images), rtol=1e-2)
