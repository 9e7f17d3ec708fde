"""The forms in which one model is measured, and the files that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch

from mfcompile import runtime
from mfcompile.benchmark.timing import SessionFile, first_line
from mfcompile.errors import InputError, MfcompileError
from mfcompile.exporters.stored_weights import DOMAIN
from mfcompile.exporting import export_onnx
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.onnx_wire import read_file
from mfcompile.steps import capture

LEAST_SPARSITY = 0.2
"""A weight of a dense file with at least this fraction of zeros is taken for pruned."""


@dataclass(frozen=True)
class Variant:
    """One form of a model.

    Attributes:
        name: what it is called.
        format, values: of its file; see ``mfcompile.export_onnx``.
        uses_runtime: the library of the sparse runtime is registered.
        description: what it is, in words.
        is_decoded: ``mfcompile.load_session`` decodes packed weights before onnxruntime sees them.
    """

    name: str
    format: str
    values: str
    uses_runtime: bool
    description: str
    is_decoded: bool = False


VARIANTS = (
    Variant("dense", "dense", "fp32", False, "dense file, zeros stored, stock onnxruntime"),
    Variant("packed", "packed", "fp32", False, "packed file, stock onnxruntime"),
    Variant("decoded", "packed", "fp32", False, "packed file, decoded by load_session", True),
    Variant("runtime", "packed", "fp32", True, "packed file, sparse runtime"),
    Variant("int8", "dense", "int8", False, "dense int8 file, stock onnxruntime"),
    Variant("int8-runtime", "packed", "int8", True, "packed int8 file, sparse runtime"),
)
"""Every form, the one that others are compared with first."""


@dataclass(frozen=True)
class PreparedVariant:
    """A form with its file, or with the reason why there is none.

    Attributes:
        variant: the form.
        file: what is loaded; None where there is none.
        size_bytes: all its files together.
        reason: why there is none.
    """

    variant: Variant
    file: SessionFile | None = None
    size_bytes: int | None = None
    reason: str | None = None


class FormSource(Protocol):
    """Where the files of a model in its forms come from."""

    def file(self, format: str, values: str) -> Path:
        """The file of one form.

        Raises:
            MfcompileError: there is none; says why.
        """


class CapturedForms:
    """Files exported from a captured model with masks, each when it is first asked for.

    Args:
        captured: the model with its masks.
        folder: where files are written.
    """

    def __init__(self, captured: CapturedGraph, folder: Path) -> None:
        self._captured, self._folder = captured, folder
        self._files: dict[tuple[str, str], Path] = {}

    def file(self, format: str, values: str) -> Path:
        """See FormSource."""
        if (format, values) not in self._files:
            path = self._folder / f"{format}-{values}.onnx"
            self._files[format, values] = export_onnx(self._captured, path, format=format, values=values).path
        return self._files[format, values]


class FileForms:
    """A pruned .onnx file, as it is, unpacked, and exported again from its unpacked weights.

    Args:
        path: the file.
        inputs: example inputs; None where they are made up.
        folder: where files are written.
    """

    def __init__(self, path: Path, inputs: Any, folder: Path) -> None:
        self._path, self._inputs, self._folder = path, inputs, folder
        metadata = read_metadata(path)
        self._format = "packed" if metadata.get("mfcompile.format") == "packed" or has_sparse_layers(path) else "dense"
        self._values = metadata.get("mfcompile.values", "fp32")
        self._dense: Path | None = None
        self._exported: CapturedForms | None = None

    def file(self, format: str, values: str) -> Path:
        """See FormSource."""
        if format == self._format and (values == self._values or (values == "fp32" and self._values == "fp16")):
            return self._path
        if self._values == "int8" and values != "int8":
            raise InputError(f"{self._path.name} stores int8 weights: their fp32 values are lost. Give the fp32 file")
        if format == "dense" and values == "fp32":
            return self._unpacked()
        if self._exported is None:
            self._exported = CapturedForms(self._pruned(), self._folder)
        try:
            return self._exported.file(format, values)
        except InputError as error:
            if values != "int8":
                raise
            raise InputError(
                f"it is written from a PyTorch model, not from an .onnx file ({error}): bench model.py with --masks"
            ) from error

    def _unpacked(self) -> Path:
        if self._format == "dense":
            return self._path
        if self._dense is None:
            from mfcompile.loading import unpack

            self._dense = unpack(self._path, self._folder / "unpacked.onnx")[0]
        return self._dense

    def _pruned(self) -> CapturedGraph:
        """The dense file captured, with masks where its weights are zero."""
        captured = capture(self._unpacked(), self._inputs)
        masks = masks_of_zeros(captured)
        if not masks:
            raise InputError(
                f"no weight of {self._path.name} has {LEAST_SPARSITY:.0%} zeros or more: there is nothing to pack. "
                f"Prune it first"
            )
        return replace(captured, masks=masks)


def masks_of_zeros(captured: CapturedGraph) -> MaskSet:
    """Masks that keep what is not zero, of every float matrix that has at least ``LEAST_SPARSITY`` zeros."""
    packed = {}
    for name, parameter in captured.module.named_parameters():
        if parameter.ndim >= 2 and parameter.numel():
            kept = parameter.detach() != 0
            if torch.count_nonzero(kept) <= (1 - LEAST_SPARSITY) * parameter.numel():
                packed[name] = PackedMask.pack(kept)
    return MaskSet(packed)


def prepare_variants(
    source: FormSource, wanted: Sequence[str] | None, progress: Callable[[int, int], None]
) -> list[PreparedVariant]:
    """The file of every form that is asked for, or the reason why there is none.

    Args:
        source: gives the files.
        wanted: names of forms; None for all.
        progress: called with (forms done, forms in all).

    Raises:
        InputError: a name is unknown, or is there twice.
    """
    chosen = choose_variants(wanted)
    found = []
    for index, variant in enumerate(chosen):
        progress(index, len(chosen))
        found.append(_prepare(source, variant))
    progress(len(chosen), len(chosen))
    return found


def choose_variants(wanted: Sequence[str] | None) -> tuple[Variant, ...]:
    """The forms of these names, in the order of ``VARIANTS``; None for all.

    Raises:
        InputError: a name is unknown, or there is none.
    """
    known = [variant.name for variant in VARIANTS]
    unknown = [name for name in wanted or () if name not in known]
    if unknown or (wanted is not None and not wanted):
        named = f"{', '.join(unknown)} is not known" if unknown else "none is named"
        raise InputError(f"variants: {named}; choose from {', '.join(known)}")
    return tuple(variant for variant in VARIANTS if wanted is None or variant.name in wanted)


def _prepare(source: FormSource, variant: Variant) -> PreparedVariant:
    library = None
    if variant.uses_runtime:
        missing = runtime.why_unavailable()
        if missing is not None:
            return PreparedVariant(variant, reason=missing)
        library = runtime.library_path()
    try:
        path = source.file(variant.format, variant.values)
    except MfcompileError as error:
        return PreparedVariant(variant, reason=first_line(error))
    if variant.uses_runtime and not has_sparse_layers(path):
        return PreparedVariant(
            variant,
            reason="its file holds no sparse layers, so the runtime has nothing to run: it was written for runtimes without "
            "local functions (--inline) or by an earlier version, or no layer is sparse enough to gain",
        )
    return PreparedVariant(variant, SessionFile(variant.name, path, library, variant.is_decoded), size_of(path))


def size_of(path: Path) -> int:
    """Bytes of an .onnx file and of the external data that it names."""
    return path.stat().st_size + sum(file.stat().st_size for file in read_file(path).data_files)


def has_sparse_layers(path: Path) -> bool:
    """Whether the graph has operators of the sparse runtime."""
    return any(node.domain == DOMAIN for node in _load(path).graph.node)


def read_metadata(path: Path) -> dict[str, str]:
    """What an ONNX file says about itself."""
    return {item.key: item.value for item in _load(path).metadata_props}


def _load(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as an ONNX file ({first_line(error)}): it is damaged. Export it again"
        ) from error
