"""Writing the parts of a divided model beside their manifest, all of them or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.split_build import ModelPart, SplitModel
from mfcompile.exporters.split_manifest import (
    MANIFEST,
    Part,
    PartFile,
    SplitManifest,
    TensorSpec,
    sha256_of,
)
from mfcompile.exporters.stored_weights import WEIGHTS_KEY
from mfcompile.files import staged_directory

WritePart = Callable[[ModelPart, Path], ExportedArtifact]
"""Writes one part into the given .onnx file."""


def check_directory(path: Path) -> None:
    """Refuse a path that cannot hold the parts of a model.

    Raises:
        InputError: it is a file, or is called like one.
    """
    if path.is_file() or path.suffix == ".onnx":
        raise InputError(
            f"a split model is several files, and {path} names one. Give the directory to write, such as {path.with_suffix('')}"
        )


def write_split(
    divided: SplitModel,
    directory: Path,
    modalities: Mapping[str, str | None],
    write_part: WritePart,
    accept: Callable[[Path], None] | None = None,
) -> ExportedArtifact:
    """Write every part and the manifest into a directory.

    The files appear together: in a new directory by one rename; in one that holds other files the manifest of an
    earlier export goes first and the new one comes last, so that what is between is no model. Other files stay.

    Args:
        divided: the parts.
        directory: where to write; it may exist.
        modalities: input name -> modality, for the manifest.
        write_part: writes one part.
        accept: called with the manifest before anything is published; what it raises, nothing is kept of.

    Returns:
        The artefact of the whole; ``path`` is the manifest, ``parts`` are the artefacts of the parts.

    Raises:
        InputError: the directory cannot be written to.
        ExportError: writing failed.
    """
    check_directory(directory)
    with _staged(directory) as staging:
        staged = [write_part(part, staging / f"{part.name}.onnx") for part in divided.parts]
        manifest = SplitManifest(
            tuple(_describe(part, item, modalities) for part, item in zip(divided.parts, staged, strict=True)),
            divided.input_names,
            divided.output_names,
            {
                key.removeprefix("mfcompile."): value
                for key, value in divided.parts[-1].model.metadata_props.items()
                if key != WEIGHTS_KEY  # of one part only; every file says its own
            },
            divided.notes,
        )
        path = manifest.save(staging)
        manifest_bytes = path.stat().st_size
        if accept is not None:
            accept(path)
    parts = tuple(_moved(item, directory) for item in staged)
    encodings = {item.fqn: item for part in parts for item in part.encodings}
    return ExportedArtifact(
        path=directory / MANIFEST,
        format=parts[0].format,
        values=parts[0].values,
        size_bytes=sum(part.size_bytes for part in parts) + manifest_bytes,
        dense_size_bytes=sum(part.dense_size_bytes for part in parts),
        encodings=tuple(encodings.values()),
        input_names=divided.input_names,
        output_names=divided.output_names,
        dynamic_axes={name: axes for part in parts for name, axes in part.dynamic_axes.items()},
        files=(*(file for part in parts for file in part.files), directory / MANIFEST),
        opset=parts[0].opset,
        load_peak_bytes=sum(part.load_peak_bytes for part in parts),
        load_time_ratio=_mean_time_ratio(parts),
        notes=divided.notes,
        parts=parts,
    )


@contextmanager
def _staged(directory: Path) -> Iterator[Path]:
    """A directory whose files come to stand in the given one when the block ends well."""
    if not directory.exists() or not any(directory.iterdir()):
        with staged_directory(directory) as staging:
            yield staging
        return
    try:
        staging = Path(tempfile.mkdtemp(dir=directory, prefix=f".{MANIFEST}."))
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}. Choose another output directory") from error
    try:
        yield staging
        publish_parts(staging, directory)
    except OSError as error:
        raise ExportError(
            f"{directory} could not be written: {error.strerror or error}. Free space, or choose another"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_parts(source: Path, directory: Path) -> None:
    """Move the files of a complete split model into a directory; other files that it holds stay.

    Args:
        source: a directory that holds the parts and their manifest.
        directory: where they go, on the same file system.
    """
    if not directory.exists() or not any(directory.iterdir()):
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, directory)
        return
    old: set[str] = set()
    if (directory / MANIFEST).exists():
        try:
            old = {file.file for part in SplitManifest.load(directory).parts for file in part.files}
        except InputError:  # a damaged manifest says nothing of its files
            old = set()
        (directory / MANIFEST).unlink()
    new = {file.name for file in source.iterdir()}
    for name in sorted(new - {MANIFEST}):
        os.replace(source / name, directory / name)
    for name in sorted(old - new):
        (directory / name).unlink(missing_ok=True)
    os.replace(source / MANIFEST, directory / MANIFEST)


def _mean_time_ratio(parts: Sequence[ExportedArtifact]) -> float:
    """Of loading all parts, each as long as its dense bytes are many."""
    weights = [part.dense_size_bytes for part in parts]
    return sum(part.load_time_ratio * weight for part, weight in zip(parts, weights, strict=True)) / max(sum(weights), 1)


def _moved(artifact: ExportedArtifact, directory: Path) -> ExportedArtifact:
    files = tuple(directory / file.name for file in artifact.files)
    return replace(artifact, path=directory / artifact.path.name, files=files)


def _describe(part: ModelPart, artifact: ExportedArtifact, modalities: Mapping[str, str | None]) -> Part:
    files = tuple(PartFile(file.name, file.stat().st_size, sha256_of(file)) for file in artifact.files)
    graph = part.model.graph
    inputs = []
    for value in graph.inputs:
        name = str(value.name)
        inputs.append(_tensor(value, part.sources.get(name), None if name in part.sources else modalities.get(name)))
    return Part(part.name, files, tuple(inputs), tuple(_tensor(value, None, None) for value in graph.outputs))


def _tensor(value: ir.Value, part: str | None, modality: str | None) -> TensorSpec:
    assert value.dtype is not None  # inputs and outputs have types
    shape = value.shape
    sizes = None if shape is None else tuple(size if isinstance(size, int) else size.value for size in shape)
    return TensorSpec(str(value.name), value.dtype.numpy().name, sizes, part, modality)
