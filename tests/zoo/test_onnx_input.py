"""Round trips: a torch model, exported, and pruned as a file, against the same model pruned as a module."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.compile import CompiledModel
from mfcompile.inputs import output_tensors
from tests.onnx_models import without_names

pytest.importorskip("transformers")

from tests.zoo import families

# Exporting takes most of the time: one family runs always, the others with the slow tests.
NAMES = ("blip_itm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("clip", "siglip", "llava", "florence")))

# Weights of the module that are not in its file under their own name: unused ones, and the other name of a tied one.
ABSENT = {
    "blip_itm": {"text_proj.weight", "vision_proj.weight"},
    "florence": {"model.language_model.shared.weight", "lm_head.weight"},
}


@dataclass(frozen=True)
class Pair:
    """A module that was pruned, and the inputs that it was calibrated with."""

    module: nn.Module
    inputs: dict[str, Tensor]
    pruned: CompiledModel


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="mfcompile-onnx-"))


@functools.cache
def pair(name: str) -> Pair:
    torch.manual_seed(0)
    module, inputs = getattr(families, name)()
    return Pair(module.eval(), inputs, mfcompile.compile_pruned(module, inputs, calibration=[inputs]))


def own_export(name: str) -> Path:
    path = folder() / f"{name}_own.onnx"
    if not path.exists():
        known = pair(name)
        mfcompile.export_onnx(mfcompile.capture(known.module, known.inputs), path, format="dense")
    return path


def dynamo_export(name: str) -> Path:
    path = folder() / f"{name}_dynamo.onnx"
    if not path.exists():
        known = pair(name)
        torch.onnx.export(known.module, (), kwargs=known.inputs, f=path, dynamo=True, external_data=False, verbose=False)
    return path


def legacy_export(name: str) -> Path:
    path = folder() / f"{name}_legacy.onnx"
    if not path.exists():
        known = pair(name)
        torch.onnx.export(
            _Positional(known.module, tuple(known.inputs)),
            tuple(known.inputs.values()),
            path,
            dynamo=False,
            input_names=list(known.inputs),
        )
    return path


class _Positional(nn.Module):
    """A model that takes tensors in order and gives a tuple, as the older exporter wants it."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(output_tensors(self.inner(**dict(zip(self.names, tensors, strict=True)))).values())


def fates(model: CompiledModel) -> dict[str, tuple[str, bool]]:
    return {site.name: (site.region, site.skipped is None) for site in model.regions.sites}


@functools.cache
def pruned_file(name: str) -> CompiledModel:
    return mfcompile.compile_pruned(own_export(name), calibration=[pair(name).inputs])


@pytest.mark.parametrize("name", NAMES)
def test_regions_statistics_and_masks_are_those_of_the_module(name: str) -> None:
    module, file = pair(name).pruned, pruned_file(name)
    expected = {fqn: fate for fqn, fate in fates(module).items() if fqn not in ABSENT.get(name, ())}
    assert {fqn: fate for fqn, fate in fates(file).items() if fqn not in ABSENT.get(name, ())} == expected
    assert file.statistics.padding_masks == module.statistics.padding_masks
    assert file.statistics.diagnostics == module.statistics.diagnostics
    assert set(file.statistics.sites) == set(module.statistics.sites)
    for fqn, site in file.statistics.sites.items():
        other = module.statistics.sites[fqn]
        assert (site.token_count, site.padding_count, site.sample_count) == (
            other.token_count,
            other.padding_count,
            other.sample_count,
        ), fqn
        scale = float(other.sum_of_squares.max())
        assert torch.allclose(site.sum_of_squares, other.sum_of_squares, rtol=1e-4, atol=1e-5 * scale), fqn
    assert set(file.masks) == set(module.masks)
    same = sum(int((file.masks[fqn] == module.masks[fqn]).sum()) for fqn in file.masks)
    assert same >= 0.999 * module.masks.weight_count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("format", ["dense", "packed"])
def test_the_pruned_file_is_the_original_with_zeros(name: str, format: str, tmp_path: Path) -> None:
    file = pruned_file(name)
    artifact = file.export_onnx(tmp_path / "model.onnx", format=format)
    parity = file.verify(artifact)
    assert parity.passed
    assert all(output.max_abs_diff == 0.0 for output in parity.outputs)
    if format == "dense":
        before, after = onnx.load(own_export(name)), onnx.load(artifact.path)
        changed = {old.name for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True) if old != new}
        assert changed == set(file.masks)
        for model in (before, after):
            del model.graph.initializer[:]
        assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_names_has_the_same_regions(name: str) -> None:
    renamed, names = without_names(onnx.load(own_export(name)))
    path = folder() / f"{name}_numbers.onnx"
    onnx.save(renamed, path)
    inputs = {names[key]: tensor for key, tensor in pair(name).inputs.items()}
    regions = mfcompile.infer_regions(mfcompile.capture(path, inputs))
    found = {site.name: (site.region, site.skipped is None) for site in regions.sites}
    expected = {}
    for fqn, fate in fates(pruned_file(name)).items():
        bare, bracket, rows = fqn.partition("[")
        expected[names[bare] + bracket + rows] = fate
    assert found == expected
    assert "layers" in [item.subject for item in regions.diagnostics]


def by_values(model: CompiledModel, parameters: dict[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """FQN of the parameter whose values a weight has, either way round -> FQN in the file, whether it is turned."""
    found = {}
    for fqn in model.masks:
        weight = model.captured.parameter(fqn)
        for name, parameter in parameters.items():
            if parameter.shape == weight.shape and torch.equal(parameter, weight):
                found[name] = (fqn, False)
            elif parameter.ndim == 2 and parameter.T.shape == weight.shape and torch.equal(parameter.T, weight):
                found[name] = (fqn, True)
    return found


# siglip: the exporter folds the slices of the head's fused projection into two weights of their own.
SPLIT = {("siglip", "legacy"): {"vision_model.head.attention.in_proj_weight"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exporter", "export"),
    [
        ("clip", "dynamo", dynamo_export),
        ("blip_itm", "dynamo", dynamo_export),
        ("clip", "legacy", legacy_export),
        ("siglip", "legacy", legacy_export),
        ("llava", "legacy", legacy_export),
        ("florence", "legacy", legacy_export),
    ],
)
def test_files_of_other_exporters(name: str, exporter: str, export: Callable[[str], Path], tmp_path: Path) -> None:
    """They turn weights round and call them ``val_20`` or ``onnx::MatMul_613``; regions and masks are the same."""
    known = pair(name)
    file = mfcompile.compile_pruned(str(export(name)), calibration=[known.inputs])
    parameters = {fqn: parameter.detach() for fqn, parameter in known.module.named_parameters()}
    found = by_values(file, parameters)
    assert set(known.pruned.masks) - set(found) == SPLIT.get((name, exporter), set())
    regions = file.regions.weights
    assert {fqn: regions[own] for fqn, (own, _) in found.items()} == {fqn: known.pruned.regions.weights[fqn] for fqn in found}
    masks = {fqn: file.masks[own].T if turned else file.masks[own] for fqn, (own, turned) in found.items()}
    same = sum(int((mask == known.pruned.masks[fqn]).sum()) for fqn, mask in masks.items())
    assert same >= 0.999 * sum(mask.numel() for mask in masks.values())
    for format in ("packed", "dense"):
        assert file.verify(file.export_onnx(tmp_path / f"{format}.onnx", format=format)).passed


@pytest.mark.slow
def test_the_trained_example(tmp_path: Path) -> None:
    """A model with three regions and trained weights."""
    from mfcompile.frontends.sources import load_source

    path = Path(__file__).parents[2] / "examples" / "emoji_xvlm" / "model.py"
    source = load_source(path)
    assert source.calibration is not None
    batches: list[Any] = [batch for batch, _ in zip(source.calibration(), range(2), strict=False)]
    captured = mfcompile.capture(source.model, source.example_inputs)
    options = {"modalities": source.modalities, "regions": source.regions}
    file_path = tmp_path / "dense.onnx"
    mfcompile.export_onnx(captured, file_path, format="dense")
    module = mfcompile.compile_pruned(source.model, source.example_inputs, calibration=batches, **options)  # type: ignore[arg-type]
    file = mfcompile.compile_pruned(file_path, calibration=batches, modalities=dict(source.modalities) or None)
    assert {fqn: fate for fqn, fate in fates(file).items() if fate[1]} == {
        fqn: fate for fqn, fate in fates(module).items() if fate[1]
    }
    same = sum(int((file.masks[fqn] == module.masks[fqn]).sum()) for fqn in file.masks)
    assert same >= 0.999 * module.masks.weight_count
    assert file.verify(file.export_onnx(tmp_path / "packed.onnx")).passed
