"""From a SOURCE on the command line to a captured model with its regions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mfcompile.cli.console import StageProgress, Terminal
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.graph import CapturedGraph
    from mfcompile.masks import MaskSet
    from mfcompile.recipe import Recipe
    from mfcompile.region import RegionMap
    from mfcompile.token_request import TokenRequest


_MAPPINGS = ("regions", "modalities", "criterion_options", "update_options", "method_options")
"""Options that are given as NAME=VALUE."""


def option(args: argparse.Namespace, name: str) -> Any:
    """The value of an option in the form that a recipe keeps it; None where it was not given."""
    value = getattr(args, name, None)
    if isinstance(value, list):
        return dict(value) if name in _MAPPINGS else tuple(value)
    return value


def region_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of ``add_region_options`` that were given."""
    names = ("targets", "ignore", "regions", "modalities", "padding_mask")
    return {name: value for name in names if (value := option(args, name)) is not None}


def load(path: Path, progress: StageProgress, *, weights: bool = True) -> ModelSource:
    """Load a model.py, an archive of torch.export or a model directory (without its weights, for a plan).

    Raises:
        InputError: there is no model, or it does not define what is needed.
    """
    with progress.stage("load"):
        from mfcompile.frontends.sources import load_source

        return load_source(path, weights=weights)


def load_recipe(recipe: Recipe, progress: StageProgress) -> ModelSource:
    """The source of a recipe, with the calibration data that the recipe names.

    Raises:
        InputError: there is no model, or no calibration data where the recipe says.
    """
    source = load(recipe.source, progress)
    if recipe.calibration is None:
        return source
    from mfcompile.frontends.calibration_files import load_calibration

    fixed_batch = getattr(source.model, "fixed_batch", None) if source.kind == "onnx" else None
    return replace(source, calibration=load_calibration(recipe.calibration, fixed_batch))


def announce(source: ModelSource, terminal: Terminal, *, is_calibrated: bool = True) -> None:
    """Say what is worth knowing before the long work begins.

    Args:
        source: the model.
        terminal: where it is said.
        is_calibrated: calibration data will be run; nobody misses them otherwise.
    """
    for note in source.notes:
        terminal.note(f"note: {note}")
    if source.calibration is None and is_calibrated:
        if source.kind == "onnx":
            terminal.warn(
                "there is no calibration data: RANDOM inputs, made from the types of the file's inputs, stand in for it. Which "
                "weights matter on noise says little of real data: pass --calibration batches.npz, with a few hundred samples"
            )
            return
        loads = "file" if source.kind == "pt2" else "directory"
        where = "in model.py" if source.kind == "python" else f"in a model.py that loads this {loads}"
        terminal.warn(
            f"there is no calibration data, so the example inputs stand in for it. Masks are only as good as the data: "
            f"define calibration_batches {where}, with a few hundred real samples"
        )


def example_of(source: ModelSource) -> Any:
    """The example inputs of a source, the first calibration batch where it has none; None without either."""
    from mfcompile.onnx_entry import first_batch

    if source.example_inputs is not None or source.calibration is None:
        return source.example_inputs
    return first_batch(source.calibration())[0]


def merged(source: ModelSource, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the source says about its inputs and regions, overridden by options; as ``infer_regions`` takes it."""
    return {
        "modalities": {**(source.modalities or {}), **options.get("modalities", {})} or None,
        "regions": {**(source.regions or {}), **options.get("regions", {})} or None,
        "targets": options.get("targets"),
        "ignore": options.get("ignore") or None,
    }


def capture_source(
    source: ModelSource, options: Mapping[str, Any], progress: StageProgress, tokens: TokenRequest | None = None
) -> tuple[CapturedGraph, RegionMap]:
    """Capture a loaded model, with fewer tokens where that is asked for, and find its regions."""
    from mfcompile.steps import capture, infer_regions

    with progress.stage("capture"):
        captured = capture(source.model, example_of(source))
        if tokens is not None:
            captured = tokens.apply(captured, merged(source, options)["modalities"])
    with progress.stage("regions"):
        regions = infer_regions(captured, **merged(source, options))
    return captured, regions


def capture_masked(
    source: ModelSource, masks: MaskSet | None, progress: StageProgress, metadata: Mapping[str, str] | None = None
) -> CapturedGraph:
    """Capture a loaded model, cut its units and tokens as those of a file were, and apply saved masks.

    Args:
        source: the model.
        masks: None applies none.
        progress: of the work.
        metadata: of the file; None cuts no tokens.

    Raises:
        InputError: the masks were made for other weights (names both fingerprints).
    """
    from mfcompile.compile import with_masks
    from mfcompile.steps import capture

    with progress.stage("capture"):
        captured = capture(source.model, example_of(source))
        if metadata:
            from mfcompile.comp.structure import repeat_structure
            from mfcompile.token_request import repeat_cuts

            smaller = repeat_structure(captured, metadata, source.modalities, masks.refitted if masks is not None else None)
            captured = repeat_cuts(captured, metadata, source.modalities) if smaller is None else smaller
    if masks is None:
        return captured
    with progress.stage("apply"):
        return with_masks(captured, masks)
