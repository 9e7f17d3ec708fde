"""mfcompile: prune any vision-language model once, gradient-free, with MULTIFLOW, and export it to ONNX.

import mfcompile
compiled = mfcompile.compile_pruned(model, example_inputs, sparsity=0.63, calibration=batches)
compiled.export_onnx("model.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mfcompile._version import __version__

if TYPE_CHECKING:
    from mfcompile.artifact import ExportedArtifact, ParityReport
    from mfcompile.benchmark.bench import bench
    from mfcompile.benchmark.result import Benchmark
    from mfcompile.comp.one_shot import prune_jointly
    from mfcompile.comp.options import CompOptions
    from mfcompile.comp.result import JointlyPruned
    from mfcompile.comp.trained_space import TrainingOptions
    from mfcompile.comp.training import train_jointly
    from mfcompile.comparison import compare
    from mfcompile.comparison_result import Comparison
    from mfcompile.compile import CompiledModel, compile_pruned
    from mfcompile.errors import (
        CalibrationError,
        CaptureError,
        ExportError,
        InputError,
        MaskError,
        MfcompileError,
        ParityError,
        PassError,
        PostconditionError,
        PreconditionError,
        RegionError,
    )
    from mfcompile.exporters.split_session import load_parts
    from mfcompile.exporting import export_onnx, verify
    from mfcompile.graph import CapturedGraph
    from mfcompile.loading import load_session, unpack
    from mfcompile.masked_weights import masks_of, strip
    from mfcompile.masks import MaskSet
    from mfcompile.passes.criteria.base import Criterion, Need, SiteData
    from mfcompile.region import PruneSite, RegionMap
    from mfcompile.statistics import CalibrationStatistics
    from mfcompile.steps import apply_masks, calibrate, capture, infer_regions, select_masks
    from mfcompile.structure import (
        RefusedUnit,
        StructuralUnit,
        StructuralUnits,
        find_units,
        output_weights,
        prune_structure,
        remove_units,
        unit_norms,
    )
    from mfcompile.tokens import TokenEvidence, find_token_sites, prune_tokens, token_schedule, with_token_program
    from mfcompile.training.files import load, mask_module, save
    from mfcompile.training.lora import add_lora, merge_lora
    from mfcompile.training.trainer import MaskCallback
    from mfcompile.training.transfer import MaskTransfer, transfer_masks
    from mfcompile.training.verification import MaskVerification, verify_masks

__all__ = [
    "Benchmark",
    "CalibrationError",
    "CalibrationStatistics",
    "CaptureError",
    "CapturedGraph",
    "CompOptions",
    "Comparison",
    "CompiledModel",
    "Criterion",
    "ExportError",
    "ExportedArtifact",
    "InputError",
    "JointlyPruned",
    "MaskCallback",
    "MaskError",
    "MaskSet",
    "MaskTransfer",
    "MaskVerification",
    "MfcompileError",
    "Need",
    "ParityError",
    "ParityReport",
    "PassError",
    "PostconditionError",
    "PreconditionError",
    "PruneSite",
    "RefusedUnit",
    "RegionError",
    "RegionMap",
    "SiteData",
    "StructuralUnit",
    "StructuralUnits",
    "TokenEvidence",
    "TrainingOptions",
    "__version__",
    "add_lora",
    "apply_masks",
    "bench",
    "calibrate",
    "capture",
    "compare",
    "compile_pruned",
    "export_onnx",
    "find_token_sites",
    "find_units",
    "infer_regions",
    "load",
    "load_parts",
    "load_session",
    "mask_module",
    "masks_of",
    "merge_lora",
    "output_weights",
    "prune_jointly",
    "prune_structure",
    "prune_tokens",
    "remove_units",
    "save",
    "select_masks",
    "strip",
    "token_schedule",
    "train_jointly",
    "transfer_masks",
    "unit_norms",
    "unpack",
    "verify",
    "verify_masks",
    "with_token_program",
]

_HOMES = {
    "mfcompile.artifact": ("ExportedArtifact", "ParityReport"),
    "mfcompile.benchmark.bench": ("bench",),
    "mfcompile.benchmark.result": ("Benchmark",),
    "mfcompile.comp.one_shot": ("prune_jointly",),
    "mfcompile.comp.options": ("CompOptions",),
    "mfcompile.comp.result": ("JointlyPruned",),
    "mfcompile.comp.trained_space": ("TrainingOptions",),
    "mfcompile.comp.training": ("train_jointly",),
    "mfcompile.comparison": ("compare",),
    "mfcompile.comparison_result": ("Comparison",),
    "mfcompile.exporters.split_session": ("load_parts",),
    "mfcompile.exporting": ("export_onnx", "verify"),
    "mfcompile.graph": ("CapturedGraph",),
    "mfcompile.loading": ("load_session", "unpack"),
    "mfcompile.masks": ("MaskSet",),
    "mfcompile.passes.criteria.base": ("Criterion", "Need", "SiteData"),
    "mfcompile.masked_weights": ("masks_of", "strip"),
    "mfcompile.region": ("PruneSite", "RegionMap"),
    "mfcompile.statistics": ("CalibrationStatistics",),
    "mfcompile.steps": ("apply_masks", "calibrate", "capture", "infer_regions", "select_masks"),
    "mfcompile.structure": (
        "RefusedUnit",
        "StructuralUnit",
        "StructuralUnits",
        "find_units",
        "output_weights",
        "prune_structure",
        "remove_units",
        "unit_norms",
    ),
    "mfcompile.tokens": ("TokenEvidence", "find_token_sites", "prune_tokens", "token_schedule", "with_token_program"),
    "mfcompile.training.files": ("load", "mask_module", "save"),
    "mfcompile.training.lora": ("add_lora", "merge_lora"),
    "mfcompile.training.trainer": ("MaskCallback",),
    "mfcompile.training.transfer": ("MaskTransfer", "transfer_masks"),
    "mfcompile.training.verification": ("MaskVerification", "verify_masks"),
    "mfcompile.errors": tuple(name for name in __all__ if name.endswith("Error")),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `mfcompile --help` should not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'mfcompile' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME_OF.get(name, "mfcompile.compile")), name)
