"""Options of the weight update ``sparsegpt``, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.sparsegpt import SparseGptOptions
from mfcompile.passes.weight_update import updated
from tests.models import tiny_vlm, vlm_batch, vlm_captured, vlm_regions
from tests.unit.passes.test_sparsegpt import pixels, two_layers, vlm_batches, vlm_masks, vlm_run


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dampening": 1}, "sparsegpt has no option 'dampening'; its options are damping, memory_mib"),
            ({"damping": -0.1}, "damping is a number of at least 0, got -0.1"),
            ({"damping": float("nan")}, "damping is a number of at least 0, got nan"),
            ({"memory_mib": "much"}, "memory_mib is a number of at least 0, got 'much'"),
            ({"passes": 0}, "passes is a positive integer, got 0"),
            ({"block_columns": None}, "block_columns is a positive integer, got None"),
            ({"num_samples": 2.5}, "num_samples is a positive integer, got 2.5"),
        ],
    )
    def test_what_is_not_valid_is_refused_before_anything_runs(self, options: dict[str, Any], message: str) -> None:
        def calibration() -> list[Any]:
            raise AssertionError("the batches were asked for")

        with pytest.raises(InputError, match=message):
            mfcompile.compile_pruned(
                tiny_vlm(), vlm_batch(), update="sparsegpt", update_options=options, calibration=calibration
            )

    def test_options_without_an_update_are_refused(self) -> None:
        with pytest.raises(InputError, match="are options of a weight update, and none is asked for"):
            mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), update_options={"damping": 0.1})

    def test_calibration_options_hold_for_the_update_too(self) -> None:
        batches = vlm_batches()
        few = mfcompile.compile_pruned(
            tiny_vlm(), vlm_batch(), update="sparsegpt", calibration=batches, num_calibration_samples=5
        )
        one = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), update="sparsegpt", calibration=batches[:1])
        assert few.masks == one.masks
        assert few.report["options"]["update_options"] == {"num_samples": 5}
        with pytest.raises(InputError, match="padding_mask='nothing' is no"):
            mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), criterion="magnitude", update="sparsegpt", padding_mask="nothing")

    def test_no_batch_is_one_error(self) -> None:
        with pytest.raises(CalibrationError, match="the calibration set is empty"):
            mfcompile.select_masks(vlm_captured(), vlm_regions(), criterion="magnitude", update="sparsegpt", batches=[])

    def test_a_module_that_cannot_be_copied_is_refused_before_anything_runs(self) -> None:
        class Stubborn(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = two_layers()

            def forward(self, image: Tensor) -> Tensor:
                result: Tensor = self.layers(image)
                return result

            def __deepcopy__(self, memo: Any) -> Any:
                raise TypeError("a socket has no copy")

        def refuse() -> list[Any]:
            raise AssertionError("the batches were asked for")

        captured = mfcompile.capture(Stubborn(), pixels())
        regions = mfcompile.infer_regions(captured)
        masks = mfcompile.select_masks(captured, regions, sparsity=0.5, criterion="magnitude")
        with pytest.raises(InputError, match=r"Stubborn cannot be copied .*socket has no copy.*or the update"):
            updated(PruningRun(captured, regions, 0.5, batches=refuse), masks, SparseGptOptions())

    def test_an_onnx_file_is_refused(self) -> None:
        captured = replace(vlm_captured(), frontend="onnx")
        with pytest.raises(InputError, match=r"this model is an \.onnx file\. Prune the module that the file was made from"):
            updated(vlm_run(captured=captured), vlm_masks(), SparseGptOptions())
