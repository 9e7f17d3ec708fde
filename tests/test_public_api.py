"""The public list, by heart: changing it is a decision, not an accident."""

from __future__ import annotations

import inspect

import mfcompile

PUBLIC = {
    "Benchmark", "bench", "CalibrationError", "CalibrationStatistics", "CaptureError", "CapturedGraph", "Comparison",
    "CompiledModel", "Criterion", "ExportError", "ExportedArtifact", "InputError", "MaskCallback", "MaskError", "MaskSet",
    "MaskTransfer", "MaskVerification", "MfcompileError", "Need", "ParityError", "ParityReport", "PassError",
    "PostconditionError", "PreconditionError", "PruneSite", "RegionError", "RegionMap", "SiteData", "TokenEvidence",
    "__version__", "add_lora", "apply_masks", "calibrate", "capture", "compare", "compile_pruned", "export_onnx",
    "find_token_sites", "infer_regions", "load", "load_parts", "load_session", "mask_module", "masks_of", "merge_lora",
    "prune_tokens", "save", "select_masks", "strip", "token_schedule", "transfer_masks", "unpack", "verify", "verify_masks",
    "with_token_program", "RefusedUnit", "StructuralUnit", "StructuralUnits", "find_units", "output_weights",
    "prune_structure", "remove_units", "unit_norms", "CompOptions", "JointlyPruned", "prune_jointly",
    "TrainingOptions", "train_jointly",
}  # fmt: skip


def test_public_names() -> None:
    assert set(mfcompile.__all__) == PUBLIC
    assert all(hasattr(mfcompile, name) for name in PUBLIC)


def test_public_functions_take_no_catch_all_and_are_documented() -> None:
    for name in PUBLIC:
        value = getattr(mfcompile, name)
        if inspect.isfunction(value):
            kinds = {parameter.kind for parameter in inspect.signature(value).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, name
            assert inspect.getdoc(value), name


def test_compile_pruned_keeps_its_contract() -> None:
    parameters = inspect.signature(mfcompile.compile_pruned).parameters
    assert list(parameters)[:2] == ["model", "example_inputs"]
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    expected = {"sparsity": None, "criterion": "multiflow", "calibration": None, "regions": None, "targets": None,
                "ignore": None, "padding_mask": None, "rounding": "exact", "seed": 0}  # fmt: skip
    assert {name: defaults[name] for name in expected} == expected
