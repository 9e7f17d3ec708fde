"""The output directory of ``mfcompile prune``: checked before the work, published complete or not at all."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli.console import StageProgress
from mfcompile.cli.evaluation import Evaluation
from mfcompile.errors import ExportError, InputError
from mfcompile.files import check_output_dir, staged_directory
from mfcompile.recipe import Recipe

if TYPE_CHECKING:
    from mfcompile.artifact import ExportedArtifact
    from mfcompile.compile import CompiledModel
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.graph import CapturedGraph
    from mfcompile.inputs import ExampleInputs

LATENCY_SECONDS = 4.0
"""About how long latency is measured."""

PILOT_REPEATS, MOST_REPEATS = 3, 50


def check_directory(path: Path, *, overwrite: bool) -> None:
    """Refuse an output directory before anything expensive is done.

    Raises:
        InputError: it is a file, holds something (and is not to be replaced), or cannot be written to.
    """
    if not (overwrite and path.is_dir()):
        check_output_dir(path)
    check_writable(path, option="--output-dir")


def check_writable(path: Path, *, option: str) -> None:
    """Refuse a path beside which nothing can be written.

    Raises:
        InputError: names the folder and the option that gave the path.
    """
    ancestor = path.absolute().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror} in {ancestor}. Choose another place with {option}"
        ) from error


def publish(
    directory: Path,
    overwrite: bool,
    source: ModelSource,
    recipe: Recipe,
    compiled: CompiledModel,
    evaluation: Evaluation,
    progress: StageProgress,
    *,
    beside: Path | None = None,
) -> dict[str, Any]:
    """Export, verify and measure in a directory beside the final one, and rename it when all of it is there.

    A model that cannot be written as ONNX is published without model.onnx; ``export_refused`` in the report says why. Paths
    in the recipe are relative to ``beside``, where the directory ends up; None for ``directory`` itself.

    Returns:
        The whole report.

    Raises:
        ParityError: the ONNX file does not compute what the pruned module computes; nothing is published.
    """
    from mfcompile.report import save_report, with_evaluation, with_files, with_refused_export, with_source
    from mfcompile.report_plot import plot_sparsity
    from mfcompile.saving import save_weights

    report = with_source(compiled.report, path=source.path.name, kind=source.kind, notes=source.notes)
    with staged_directory(directory, overwrite=overwrite) as staging:
        if recipe.onnx:
            try:
                report = _export(staging, source, recipe, compiled, evaluation, report, progress)
            except ExportError as error:  # the pruned PyTorch model is complete without it
                report = with_refused_export(report, str(error))
        if evaluation.metrics:
            report = with_evaluation(report, evaluation.metrics, evaluation.notes)
        with progress.stage("write"), _without_bars_of_transformers():
            if source.kind != "onnx":  # the weights of an ONNX file are saved in the ONNX file
                save_weights(compiled.strip(), staging)
            if source.save_extras is not None:
                source.save_extras(staging)
            compiled.masks.save(staging / "masks.safetensors")
            if compiled.statistics.sites:
                compiled.statistics.save(staging / "statistics.safetensors")
            ran = replace(
                recipe,
                digest=report["digest"],
                fingerprint=report["model"]["fingerprint"],
                versions=report["versions"],
            )
            ran.save(staging / "recipe.yaml", beside=beside or directory)
            plot_sparsity(report, staging)
            if compiled.joint is not None:
                compiled.joint.plot(staging)
            report = with_files(report, {file.name: file.stat().st_size for file in sorted(staging.iterdir())})
            save_report(report, staging / "report.json")
    return report


@contextmanager
def _without_bars_of_transformers() -> Iterator[None]:
    """Its progress bars would tear ours; a model that came without transformers has none."""
    logging = getattr(sys.modules.get("transformers.utils"), "logging", None)
    if logging is None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _export(
    staging: Path,
    source: ModelSource,
    recipe: Recipe,
    compiled: CompiledModel,
    evaluation: Evaluation,
    report: dict[str, Any],
    progress: StageProgress,
) -> dict[str, Any]:
    """Write model.onnx, or the parts of a split model; hold it to the module, time it, and score it."""
    from mfcompile.exporters.parity import raise_on_failure
    from mfcompile.exporting import export_onnx, verify
    from mfcompile.frontends.capture import with_export
    from mfcompile.onnx_entry import is_onnx
    from mfcompile.report import with_capture, with_latency, with_parity
    from mfcompile.report import with_export as report_export

    with progress.stage("export"):
        pruned = compiled.captured if is_onnx(compiled.captured.module) else with_export(compiled.captured)
        report = with_capture(report, pruned)
    with progress.stage("onnx"):
        artifact = export_onnx(
            pruned,
            staging if recipe.split else staging / "model.onnx",
            format=recipe.format,
            values=recipe.values,
            inline=recipe.inline,
            external_data=recipe.external_data,
            load_budget=recipe.load_budget,
            split=recipe.split,
            regions=compiled.regions,
        )
    with progress.stage("verify"):
        parity = verify(artifact, pruned)
        raise_on_failure(parity)
    with progress.stage("latency"):
        latency = measure_latency(artifact, pruned, staging, _whole(source, compiled, recipe))
    evaluation.add_onnx(artifact.path, compiled.module, pruned.example_inputs)
    return with_latency(with_parity(report_export(report, artifact), parity), latency)


def _whole(source: ModelSource, compiled: CompiledModel, recipe: Recipe) -> CapturedGraph | None:
    """The model with all that was taken out before masks; None where nothing was."""
    if compiled.joint is None and recipe.tokens is None:
        return None
    from mfcompile.cli.loading import example_of
    from mfcompile.steps import capture

    return capture(source.model, example_of(source))


def measure_latency(
    artifact: ExportedArtifact, pruned: CapturedGraph, scratch: Path, whole: CapturedGraph | None = None
) -> dict[str, Any]:
    """Time the artefact against the unpruned model in dense format, in onnxruntime, on the example inputs.

    Where it has sparse layers and ``mfcompile.runtime`` is available, it is timed with its library registered as well.

    Args:
        artifact: the file.
        pruned: what it was made from.
        scratch: a directory.
        whole: the model with all units and tokens, where ``pruned`` has fewer.
    """
    from mfcompile.onnx_file import OnnxFile
    from mfcompile.onnx_ladder import export_accepted, find_library

    is_sparse = any(item.is_sparse for item in artifact.encodings)
    library, missing = find_library() if is_sparse else (None, None)
    reason = {"sparse_missing": missing} if missing else {}
    if isinstance(pruned.module, OnnxFile):
        return {**compare(pruned.module.path, artifact.path, pruned.example_inputs, library), **reason}
    with tempfile.TemporaryDirectory(prefix=".latency-", dir=scratch) as folder:
        plain = replace(pruned, masks=None) if whole is None else whole
        dense, _ = export_accepted(plain, Path(folder) / "dense.onnx", format="dense", first=artifact.route)
        latency = {**compare(dense.path, artifact.path, pruned.example_inputs, library), **reason}
    return {**latency, **time_parts(artifact, pruned.example_inputs, library)} if artifact.parts else latency


def time_parts(artifact: ExportedArtifact, inputs: ExampleInputs, library: str | None) -> dict[str, dict[str, float]]:
    """Median milliseconds of every part of a split model, in stock onnxruntime and, where there is a library, with it."""
    from mfcompile.exporters.latency import part_latency

    ways: dict[str, str | None] = {"parts_ms": None} if library is None else {"parts_ms": None, "sparse_parts_ms": library}
    pilot = part_latency(artifact.path, inputs, repeats=1, libraries=ways)
    slowest = sum(sum(parts.values()) for parts in pilot.values())
    repeats = min(MOST_REPEATS, max(PILOT_REPEATS, int(LATENCY_SECONDS / max(slowest, 1e-6))))
    found = part_latency(artifact.path, inputs, repeats=repeats, libraries=ways)
    return {way: {name: round(1000 * median, 4) for name, median in parts.items()} for way, parts in found.items()}


def compare(dense: Path, pruned: Path, inputs: ExampleInputs, library: str | None) -> dict[str, Any]:
    """Paired latencies of the pruned file and the dense one, and how long each takes to load.

    With a library, the pruned file is measured a third time with it: "sparse", and ``sparse_ratio`` to dense.
    """
    import onnxruntime

    from mfcompile.exporters.latency import compare_latency
    from mfcompile.exporters.session import open_session

    paths = {"dense": dense, "pruned": pruned} | ({"sparse": pruned} if library is not None else {})
    libraries = {"sparse": library} if library is not None else {}
    load_ms = {}
    for name, path in paths.items():
        start = time.perf_counter()
        open_session(path, library=libraries.get(name))
        load_ms[name] = round(1000 * (time.perf_counter() - start), 1)
    result = compare_latency(paths, inputs, repeats=PILOT_REPEATS, warmup=1, libraries=libraries)
    slowest = sum(result.median(name) for name in paths)
    repeats = min(MOST_REPEATS, int(LATENCY_SECONDS / max(slowest, 1e-6)))
    if repeats > PILOT_REPEATS:
        result = compare_latency(paths, inputs, repeats=repeats, warmup=2, libraries=libraries)
    return {
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU",
        "batch_size": inputs.batch_size(),
        "repeats": max(repeats, PILOT_REPEATS),
        "medians_ms": {name: round(1000 * result.median(name), 4) for name in paths},
        "ratio": round(result.ratio("pruned", "dense"), 4),
        "load_ms": load_ms,
    } | ({"sparse_ratio": round(result.ratio("sparse", "dense"), 4)} if library is not None else {})
