"""mfcompile: prune any vision-language model once, gradient-free, with MULTIFLOW, and export it to ONNX.

    import mfcompile
    compiled = mfcompile.compile_pruned(model, example_inputs, sparsity=0.63, calibration=batches)
    compiled.export_onnx("model.onnx")
"""

from __future__ import annotations

from mfcompile._version import __version__
from mfcompile.artifact import ExportedArtifact, ParityReport
from mfcompile.compile import (
    CompiledModel,
    apply_masks,
    calibrate,
    capture,
    compile_pruned,
    export_onnx,
    infer_regions,
    select_masks,
    verify,
)
from mfcompile.errors import (
    CalibrationError,
    CaptureError,
    ExportError,
    InputError,
    MfcompileError,
    ParityError,
    PassError,
    PostconditionError,
    PreconditionError,
    RegionError,
)
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet
from mfcompile.passes.masking import strip
from mfcompile.region import PruneSite, RegionMap
from mfcompile.statistics import CalibrationStatistics

__all__ = [
    "CalibrationError",
    "CalibrationStatistics",
    "CaptureError",
    "CapturedGraph",
    "CompiledModel",
    "ExportError",
    "ExportedArtifact",
    "InputError",
    "MaskSet",
    "MfcompileError",
    "ParityError",
    "ParityReport",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "PruneSite",
    "RegionError",
    "RegionMap",
    "__version__",
    "apply_masks",
    "calibrate",
    "capture",
    "compile_pruned",
    "export_onnx",
    "infer_regions",
    "select_masks",
    "strip",
    "verify",
]
