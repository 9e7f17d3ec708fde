"""Everything downstream of weight updates, of one that keeps masks and one that does not: modules, files, ONNX, patterns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import mfcompile
from mfcompile.compile import with_masks
from mfcompile.masks import MaskSet
from tests.models import tiny_vlm, vlm_batch
from tests.unit.passes.test_sparsegpt import vlm_batches


@pytest.fixture(scope="module", params=["sparsegpt", "gradual"])
def compiled(request: pytest.FixtureRequest) -> mfcompile.CompiledModel:
    return mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), update=request.param, calibration=vlm_batches())


class TestDownstream:
    @staticmethod
    def outputs(module: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = module(**vlm_batch((4, 6), seed=8))
        return found

    def test_the_module_has_the_new_weights(self, compiled: mfcompile.CompiledModel) -> None:
        weights = dict(tiny_vlm().named_parameters())
        for name in compiled.masks:
            found = compiled.module.get_submodule(name.rpartition(".")[0]).weight
            assert isinstance(found, Tensor)
            expected = torch.where(compiled.masks[name], compiled.masks.updated_weight(name, weights[name]), 0.0)
            assert torch.equal(found, expected)
            assert not torch.equal(found, torch.where(compiled.masks[name], weights[name], 0.0))

    def test_strip_keeps_them(self, compiled: mfcompile.CompiledModel) -> None:
        for key, value in self.outputs(compiled.strip()).items():
            torch.testing.assert_close(value, self.outputs(compiled.module)[key])

    def test_a_saved_directory_reloads(self, compiled: mfcompile.CompiledModel, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        compiled.save(tmp_path / "out", onnx=False)
        fresh = tiny_vlm(seed=5)
        fresh.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
        for key, value in self.outputs(fresh).items():
            torch.testing.assert_close(value, self.outputs(compiled.module)[key])
        masks = MaskSet.load(tmp_path / "out" / "masks.safetensors")
        assert masks == compiled.masks
        again = with_masks(mfcompile.capture(tiny_vlm(), vlm_batch()), masks)
        for key, value in self.outputs(mfcompile.passes.masking.mask_module(again.module, masks)).items():
            assert torch.equal(value, self.outputs(compiled.module)[key])

    def test_onnx_computes_the_same(self, compiled: mfcompile.CompiledModel, tmp_path: Path) -> None:
        path = tmp_path / "model.onnx"
        artifact = mfcompile.export_onnx(compiled.captured, path)
        assert compiled.verify(artifact).passed
        session = onnxruntime.InferenceSession(path)
        batch = vlm_batch((4, 6), seed=8)
        found = session.run(None, {item.name: batch[item.name].numpy() for item in session.get_inputs()})
        expected = self.outputs(compiled.module)
        for item, value in zip(session.get_outputs(), found, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[item.name], rtol=1e-3, atol=1e-4)

    def test_another_sparsity_starts_from_the_dense_model(self, compiled: mfcompile.CompiledModel) -> None:
        other = compiled.at_sparsity(0.8)
        update = compiled.report["options"]["update"]
        direct = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), sparsity=0.8, update=update, calibration=vlm_batches())
        assert other.masks == direct.masks
        assert other.masks.new_values

    @pytest.mark.parametrize("pattern", ["2:4", "4x1"])
    def test_patterns_stay(self, pattern: str) -> None:
        done = mfcompile.compile_pruned(
            tiny_vlm(), vlm_batch(), criterion="wanda", pattern=pattern, update="sparsegpt", calibration=vlm_batches()
        )
        plain = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), criterion="wanda", pattern=pattern, calibration=vlm_batches())
        assert done.masks.new_values
        for name in plain.masks:
            assert torch.equal(done.masks[name], plain.masks[name])
