"""compile_pruned: deterministic, made of the public steps, and saved so that others can load it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mfcompile
from mfcompile import compile as compiling
from mfcompile.errors import CalibrationError, InputError, RegionError
from mfcompile.inputs import output_tensors
from mfcompile.passes.masking import masked_parameters
from tests.models import Batch, TinyVlm, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics


def batches() -> list[Batch]:
    return [vlm_batch((6, 3, 5, 2, 6), seed=seed) for seed in (1, 2, 3)]


def compiled(**options: object) -> mfcompile.CompiledModel:
    given: dict[str, object] = {"calibration": batches(), **options}
    return mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), **given)  # type: ignore[arg-type]


@cache
def example() -> mfcompile.CompiledModel:
    return compiled()


def test_it_is_made_of_the_public_steps() -> None:
    masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), sparsity=0.63)
    assert example().masks == masks
    assert example().regions.weights == vlm_regions().weights
    assert set(example().statistics.sites) == set(vlm_statistics().sites)
    assert example().captured.masks == masks


def test_masks_are_in_force_in_the_module() -> None:
    assert type(example().module) is TinyVlm
    found = {name: mask for name, _, mask in masked_parameters(example().module)}
    assert set(found) == set(example().masks)
    assert all(torch.equal(mask, example().masks[name]) for name, mask in found.items())


def test_the_report_is_json_and_speaks_of_these_masks() -> None:
    report = json.loads(json.dumps(example().report))
    assert example().masks.digest() in json.dumps(report)


def test_two_runs_give_the_same_masks_whatever_the_generators_were() -> None:
    torch.manual_seed(1)
    one = compiled()
    torch.manual_seed(2)
    torch.rand(7)
    assert compiled().masks == one.masks == example().masks


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compiled(calibration=None)
    assert torch.equal(torch.rand(3), expected)


class Noisy(nn.Module):
    """Draws random numbers, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = TwoLayers()

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layers(image + torch.randn(image.shape) * 3)
        return result


def test_the_seed_decides_what_a_random_model_sees() -> None:
    torch.manual_seed(0)
    model, image = Noisy(), torch.randn(1, 1, 4)
    found = [mfcompile.compile_pruned(model, image, seed=seed, calibration=[image]).statistics for seed in (0, 0, 1)]
    sums = [statistics.sites["layers.blocks.0.up.weight"].sum_of_squares for statistics in found]
    assert torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert compiled().masks == example().masks
    finally:
        torch.set_num_threads(before)


def test_the_model_is_not_changed() -> None:
    model = tiny_vlm().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(item)) for name, item in model.named_modules()}
    found = mfcompile.compile_pruned(model, vlm_batch(), calibration=batches())
    assert {name: set(vars(item)) for name, item in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(item.training for item in model.modules())
    assert found.module.training


def test_without_calibration_the_example_stands_in() -> None:
    assert compiled(calibration=None).statistics.source == "example inputs"


def test_options_reach_their_steps() -> None:
    found = compiled(
        sparsity=0.5,
        regions={"text.*": "vision"},
        targets=["vision", "text"],
        ignore=["*.down.weight"],
        num_calibration_samples=6,
        rounding="official",
        padding_mask="attention_mask",
    )
    assert found.masks.sparsity == 0.5
    assert found.regions.weights["text.0.up.weight"] == "vision"
    assert set(found.masks) == {name for name in vlm_regions().weights if name[0] in "vt" and "down" not in name}
    assert found.statistics.batch_count == 2


def test_progress_names_the_stages() -> None:
    seen: list[tuple[str, int, int | None]] = []
    compiled(progress=lambda *step: seen.append(step))
    assert list(dict.fromkeys(stage for stage, *_ in seen)) == ["capture", "calibrate", "select"]
    assert [step for step in seen if step[0] != "select"] == [
        ("capture", 0, 1), ("capture", 1, 1), ("calibrate", 1, 3), ("calibrate", 2, 3), ("calibrate", 3, 3),
    ]  # fmt: skip


def test_a_pruned_model_can_be_pruned_further() -> None:
    further = mfcompile.compile_pruned(example().strip(), vlm_batch(), calibration=batches(), sparsity=0.8)
    assert list(further.masks) == list(example().masks)
    assert further.masks.kept_count < example().masks.kept_count


def test_a_model_with_masks_in_force_is_refused() -> None:
    with pytest.raises(InputError, match=r"has masks in force.*mfcompile\.strip\(model\) first"):
        mfcompile.compile_pruned(example().module, vlm_batch())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_can_be_pruned(dtype: torch.dtype) -> None:
    batch = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in vlm_batch().items()}
    found = mfcompile.compile_pruned(tiny_vlm().to(dtype), batch)
    assert found.masks.kept_count == example().masks.kept_count
    weight = found.module.get_submodule("text.0.up").weight
    assert isinstance(weight, Tensor)
    assert weight.dtype == dtype
    assert torch.equal(weight == 0, ~found.masks["text.0.up.weight"])


class Autocast(nn.Module):
    """Weights are cast while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_vlm()

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(pixel_values, input_ids, attention_mask)


@pytest.mark.parametrize("observe", ["graph", "module"])
def test_weights_that_autocast_casts_are_seen(observe: str) -> None:
    captured = mfcompile.capture(Autocast(), vlm_batch())
    regions = mfcompile.infer_regions(captured)
    assert [site.name for site in regions.pruned_sites] == [f"model.{site.name}" for site in vlm_regions().pruned_sites]
    found = mfcompile.calibrate(captured, [vlm_batch()], regions=regions, observe=observe)
    assert all(site.token_count for site in found.sites.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 63}, InputError, r"got 63; did you mean 0\.63\?"),
        ({"seed": 1.5}, InputError, r"seed must be an integer, got 1\.5"),
        ({"seed": True}, InputError, "seed must be an integer, got True"),
        ({"calibration": []}, CalibrationError, "the calibration set is empty"),
        ({"calibration": vlm_batch()}, InputError, "give an iterable of batches"),
        ({"targets": ["nothing.*"]}, InputError, "targets: the pattern 'nothing"),
        ({"rounding": "up"}, InputError, "rounding='up' is unknown"),
        ({"modalities": {"pixels": "vision"}}, InputError, "the model has no input 'pixels'"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled(**options)


def test_numpys_numbers_are_numbers(tmp_path: Path) -> None:
    found = compiled(sparsity=np.float32(0.5))
    assert mfcompile.MaskSet.load(found.masks.save(tmp_path / "masks")).sparsity == 0.5
    assert json.dumps(found.report)


def test_a_sparsity_is_refused_before_anything_runs() -> None:
    class Untouchable(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise AssertionError("the model must not run")

    with pytest.raises(InputError, match="sparsity must be in"):
        mfcompile.compile_pruned(Untouchable(), torch.ones(1), sparsity=63)


def test_an_input_without_a_modality_asks_for_one() -> None:
    with pytest.raises(RegionError, match=r"'states' .* has no modality.*modalities=\{'states': 'vision'\}"):
        mfcompile.compile_pruned(Renamed(), torch.randn(2, 3, 4))


class Renamed(TwoLayers):
    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states)


def test_strip_leaves_the_module_as_it_is() -> None:
    stripped = example().strip()
    assert not list(masked_parameters(stripped))
    assert len(list(masked_parameters(example().module))) == len(example().masks)


def test_a_saved_directory_reloads_into_a_fresh_model(tmp_path: Path) -> None:
    path = example().save(tmp_path / "out", onnx=False)
    assert sorted(item.name for item in path.iterdir()) == ["masks.safetensors", "model.safetensors", "report.json"]
    assert mfcompile.MaskSet.load(path / "masks.safetensors") == example().masks
    assert json.loads((path / "report.json").read_text()) == json.loads(json.dumps(example().report))
    fresh = tiny_vlm(seed=1)
    fresh.load_state_dict(load_file(path / "model.safetensors"))
    for name, mask in example().masks.items():
        assert torch.equal(fresh.get_parameter(name) == 0, ~mask), name
    with torch.inference_mode():
        expected, found = example().module.eval()(**vlm_batch()), fresh(**vlm_batch())
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_trained_weights_are_what_is_saved(tmp_path: Path) -> None:
    found = compiled()
    found.module(**vlm_batch())["fused"].sum().backward()
    torch.optim.SGD(found.module.parameters(), lr=0.1).step()
    stored = load_file(found.save(tmp_path / "out", onnx=False) / "model.safetensors")
    for name, original, mask in masked_parameters(found.module):
        assert torch.equal(stored[name], torch.where(mask, original.detach(), 0.0)), name
    assert not torch.equal(stored["fusion.0.up.weight"], tiny_vlm().get_parameter("fusion.0.up.weight"))


def test_a_directory_with_something_in_it_is_kept_unless_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        example().save(tmp_path, onnx=False)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]
    example().save(tmp_path, onnx=False, overwrite=True)
    assert not (tmp_path / "mine.txt").exists()
    assert (tmp_path / "model.safetensors").exists()


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "save_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        example().save(tmp_path / "out", onnx=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["text.0.up.weight", "head.bias", "embedding.weight"])
def test_a_parameter_with_nan_is_named_itself(name: str) -> None:
    model = tiny_vlm()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = float("nan")
    with pytest.raises(InputError, match=f"the parameter {name} holds NaN"):
        mfcompile.compile_pruned(model, vlm_batch())


def test_a_half_precision_model_is_held_to_half_precision(tmp_path: Path) -> None:
    model = TwoLayers(8).eval().half()
    found = mfcompile.compile_pruned(model, {"image": torch.randn(4, 8).half()}, modalities={"image": "vision"})
    report = found.verify(found.export_onnx(tmp_path / "model.onnx"))
    assert report.passed
    assert (report.rtol, report.atol) == (2e-2, 1e-2)


def test_gradients_are_taken_once_for_several_sparsities_where_they_are_kept() -> None:
    losses: list[int] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        losses.append(1)
        return next(iter(output_tensors(module(**batch)).values())).square().mean()

    options: dict[str, Any] = {"criterion": "snip", "loss_fn": loss, "calibration": batches()[:1]}
    kept = compiled(sparsity=0.5, keep_gradients=True, **options)
    again = kept.at_sparsity(0.75)
    assert len(losses) == 1
    alone = compiled(sparsity=0.75, **options)
    assert again.masks == alone.masks
    alone.at_sparsity(0.5)
    assert len(losses) == 3
