"""Smaller models as ONNX files, with fewer tokens, masks on top, saved and loaded; and what was made for the whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import mfcompile
from mfcompile.frontends.program_module import program_module
from mfcompile.passes.flops import count_flops
from tests.structured_models import largest_difference, outputs, parameters, some_of, spread_out, zeroed
from tests.token_models import Encoder, fixed, llava_like, patches, seeded

SITE = "blocks.0.attention"


def encoder() -> Any:
    model = spread_out(seeded(Encoder))
    return model, fixed(model, {"image": patches()})


def free_dimensions(path: Path) -> set[str]:
    """Names of the dimensions of inputs and outputs that are not numbers."""
    graph = onnx.load(path).graph
    values = [*graph.input, *graph.output]
    return {
        dim.dim_param or "?" for value in values for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")
    }


def flops(captured: Any) -> int:
    assert captured.exported is not None
    return count_flops(captured.exported.program).total


def test_a_file_is_smaller_and_computes_what_the_smaller_module_does(tmp_path: Path) -> None:
    _, dense = encoder()
    smaller = mfcompile.remove_units(dense, some_of(mfcompile.find_units(dense)))
    files = [mfcompile.export_onnx(item, tmp_path / f"{name}.onnx") for name, item in (("dense", dense), ("small", smaller))]
    assert mfcompile.verify(files[1], smaller).passed
    assert not mfcompile.verify(files[1], dense).passed
    assert files[1].size_bytes < 0.8 * files[0].size_bytes
    assert free_dimensions(files[1].path) == free_dimensions(files[0].path)
    assert flops(smaller) < 0.75 * flops(dense)


@pytest.mark.parametrize("first", ["tokens", "units"])
def test_tokens_and_units_go_in_either_order(first: str) -> None:
    model, dense = encoder()
    units = mfcompile.find_units(dense)
    remove = some_of(units)
    batch = {"image": patches()}
    reference = mfcompile.prune_tokens(fixed(zeroed(model, units, remove), batch), {SITE: 0.6}, scorer="norm")
    if first == "tokens":
        both = mfcompile.remove_units(mfcompile.prune_tokens(dense, {SITE: 0.6}, scorer="norm"), remove)
    else:
        both = mfcompile.prune_tokens(mfcompile.remove_units(dense, remove), {SITE: 0.6}, scorer="norm")
    assert largest_difference(outputs(reference.module, batch), outputs(both.module, batch)) < 1e-4
    assert parameters(both.module) < parameters(model)


def test_what_is_left_is_removed_again() -> None:
    model, dense = encoder()
    units = mfcompile.find_units(dense)
    name = units.units[-1].name
    once = mfcompile.remove_units(dense, {name: [0, 2, 3]})
    twice = mfcompile.remove_units(once, {name: [0, 1]})  # which were 1 and 4
    expected = zeroed(model, units, {name: [0, 1, 2, 3, 4]})
    batch = {"image": patches()}
    assert largest_difference(outputs(expected, batch), outputs(twice.module, batch)) < 1e-5
    assert mfcompile.find_units(twice).unit(name).count == units.unit(name).count - 5


def test_multiflow_prunes_what_is_left(tmp_path: Path) -> None:
    _, dense = encoder()
    smaller = mfcompile.remove_units(dense, some_of(mfcompile.find_units(dense)))
    regions = mfcompile.infer_regions(smaller)
    masks = mfcompile.select_masks(smaller, regions, mfcompile.calibrate(smaller, regions=regions), sparsity=0.5)
    assert masks.weight_count == sum(site.weight_count for site in regions.pruned_sites)
    masked = mfcompile.apply_masks(smaller, masks)
    artifact = mfcompile.export_onnx(masked, tmp_path / "both.onnx")
    assert mfcompile.verify(artifact, masked).passed


def test_masks_go_along_with_their_weights() -> None:
    model, dense = encoder()
    regions = mfcompile.infer_regions(dense)
    masks = mfcompile.select_masks(dense, regions, mfcompile.calibrate(dense, regions=regions), sparsity=0.5)
    masked = mfcompile.apply_masks(dense, masks)
    remove = some_of(mfcompile.find_units(masked))
    smaller = mfcompile.remove_units(masked, remove)
    assert smaller.masks is not None
    batch = {"image": patches()}
    pruned = mfcompile.mask_module(model, masks)
    expected = zeroed(mfcompile.strip(pruned), mfcompile.find_units(dense), remove)
    found = mfcompile.mask_module(smaller.module, smaller.masks)
    assert largest_difference(outputs(expected, batch), outputs(found, batch)) < 1e-4
    with_values = replace(masks, new_values={name: torch.randn(masks.packed[name].kept_count) for name in list(masks)[:2]})
    again = mfcompile.remove_units(mfcompile.apply_masks(dense, with_values), remove)
    assert again.masks is not None
    for name, values in again.masks.new_values.items():
        assert values.shape == (again.masks.packed[name].kept_count,)
        assert set(values.tolist()) <= set(with_values.new_values[name].tolist())


def test_masks_and_statistics_of_the_whole_model_are_refused(tmp_path: Path) -> None:
    _, dense = encoder()
    regions = mfcompile.infer_regions(dense)
    statistics = mfcompile.calibrate(dense, regions=regions)
    masks = mfcompile.select_masks(dense, regions, statistics, sparsity=0.5)
    unit = mfcompile.find_units(dense).units[0]
    smaller = mfcompile.remove_units(dense, {unit.name: [0]})
    with pytest.raises(mfcompile.PreconditionError, match="another model, or to this one before units were removed"):
        mfcompile.apply_masks(smaller, masks)
    with pytest.raises(mfcompile.InputError, match=r"those of 16 input features.*another model"):
        mfcompile.select_masks(smaller, mfcompile.infer_regions(smaller), statistics, sparsity=0.5)
    mfcompile.save(mfcompile.mask_module(dense.module, masks), tmp_path / "masked")
    with pytest.raises(mfcompile.InputError, match=r"is \(16, 16\) float32 in the file, \(8, 16\) float32 in the module"):
        mfcompile.load(tmp_path / "masked", smaller.module)


def test_a_smaller_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, dense = encoder()
    smaller = mfcompile.remove_units(dense, some_of(mfcompile.find_units(dense)))
    state = {name: value.clone() for name, value in smaller.module.state_dict().items()}
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    again = mfcompile.remove_units(dense, some_of(mfcompile.find_units(dense)))
    again.module.load_state_dict(torch.load(tmp_path / "state.pt"))
    batch = {"image": patches()}
    assert largest_difference(outputs(smaller.module, batch), outputs(again.module, batch)) == 0


def test_a_smaller_model_is_an_archive_of_its_own(tmp_path: Path) -> None:
    _, dense = encoder()
    smaller = mfcompile.remove_units(dense, some_of(mfcompile.find_units(dense)))
    torch.export.save(smaller.exported.program, tmp_path / "small.pt2")  # type: ignore[union-attr]  # removal made it
    again = mfcompile.capture(program_module(torch.export.load(tmp_path / "small.pt2")), {"image": patches()})
    batch = {"image": patches()}
    assert largest_difference(outputs(smaller.module, batch), outputs(again.module, batch)) == 0
    assert [unit.count for unit in mfcompile.find_units(again).units] == [
        unit.count for unit in mfcompile.find_units(smaller).units
    ]


@pytest.mark.slow
def test_a_llava_like_model_with_fewer_of_everything_as_a_file(tmp_path: Path) -> None:
    model, batch = llava_like()
    spread_out(model)
    captured = fixed(model, batch)
    smaller = mfcompile.prune_structure(captured, {"region:vision": 0.5, "re:.*language_model.*self_attn": 0.5})
    both = mfcompile.prune_tokens(smaller, {"model.language_model.layers.0.self_attn": 0.5})
    artifact = mfcompile.export_onnx(both, tmp_path / "small.onnx")
    assert mfcompile.verify(artifact, both).passed
    assert all(name.startswith("batch") for name in free_dimensions(artifact.path))
    assert parameters(both.module) < 0.9 * parameters(model)
