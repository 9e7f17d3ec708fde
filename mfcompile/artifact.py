"""What exporters give back: the files they wrote, and how well these agree with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TensorEncoding:
    """How one weight is stored in an artefact.

    Attributes:
        fqn: the parameter.
        encoding: "dense", "gap8", ...
        stored_bytes: bytes it takes in the file.
        dense_bytes: bytes it would take dense in fp32.
        kept_count: non-zero places.
        weight_count: all places.
        is_sparse: SparseLinear nodes read it: with the library of ``mfcompile.runtime`` it is never decoded.
        why_dense: why a packed file computes a dense product with it, in a few words.
    """

    fqn: str
    encoding: str
    stored_bytes: int
    dense_bytes: int
    kept_count: int
    weight_count: int
    is_sparse: bool = False
    why_dense: str = ""


@dataclass(frozen=True)
class ExportedArtifact:
    """An ONNX file and what is known of it.

    Attributes:
        path: the .onnx file; external data, if any, lies beside it.
        format: "packed" or "dense".
        values: precision of the stored values of pruned weights, "fp32" or "fp16"; "int8" of all linear layers.
        size_bytes: all files of the artefact together.
        dense_size_bytes: the same model in dense format with fp32 values.
        encodings: one entry per pruned weight.
        input_names: names of the graph inputs, in order.
        output_names: names of the graph outputs, in order.
        dynamic_axes: input name -> the dimensions left free, by name.
        files: every file of the artefact.
        opset: version of the standard operator set.
        load_peak_bytes: prediction of the memory that stock onnxruntime needs to create a session.
        load_time_ratio: prediction of the time that this takes, relative to the dense file.
        notes: what a user should know (dimensions that stayed fixed, inputs that were dropped, ...).
        route: which way of exporting gave the program ("torch.export", "torch.export without cache", ...).
        parts: of a split model, one artefact per part, in running order; ``path`` is the manifest then.
    """

    path: Path
    format: str
    values: str
    size_bytes: int
    dense_size_bytes: int
    encodings: tuple[TensorEncoding, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    files: tuple[Path, ...]
    opset: int
    load_peak_bytes: int
    load_time_ratio: float = 1.0
    notes: tuple[str, ...] = ()
    route: str = ""
    parts: tuple[ExportedArtifact, ...] = ()

    @property
    def pruned_ratio(self) -> float:
        """Bytes of the pruned weights as stored, divided by their dense fp32 bytes."""
        dense = sum(encoding.dense_bytes for encoding in self.encodings)
        return sum(encoding.stored_bytes for encoding in self.encodings) / dense if dense else 1.0


@dataclass(frozen=True)
class OutputParity:
    """Agreement of one output over all compared inputs.

    Attributes:
        name: output name.
        max_abs_diff: largest |onnxruntime - PyTorch|.
        max_abs: largest |PyTorch|.
        within: every element satisfies |difference| <= atol + rtol * |PyTorch|.
    """

    name: str
    max_abs_diff: float
    max_abs: float
    within: bool


@dataclass(frozen=True)
class ParityReport:
    """onnxruntime against the masked PyTorch module.

    Attributes:
        outputs: one entry per output.
        rtol: relative tolerance.
        atol: absolute tolerance.
        batch_sizes: batch sizes that were compared; empty where the model has no batch dimension.
        cases: what was compared, in words.
        runtime: name and version of the runtime.
        notes: what could not be compared, and why.
        reference: what the file was compared with, in words.
        sparse: the same with the library of ``mfcompile.runtime`` registered; None where no layer would run on it, or it is
            not available (a note says so).
    """

    outputs: tuple[OutputParity, ...]
    rtol: float
    atol: float
    batch_sizes: tuple[int, ...]
    cases: tuple[str, ...]
    runtime: str
    notes: tuple[str, ...] = field(default=())
    reference: str = "PyTorch"
    sparse: ParityReport | None = None

    @property
    def passed(self) -> bool:
        """Every output is within the tolerance, with the library as well where that was compared."""
        return bool(self.outputs) and all(output.within for report in self.reports for output in report.outputs)

    @property
    def max_abs_diff(self) -> float:
        """Largest difference over all outputs, with the library or without."""
        return max((output.max_abs_diff for report in self.reports for output in report.outputs), default=float("nan"))

    @property
    def reports(self) -> tuple[ParityReport, ...]:
        """This report, and the one with the library where there is one."""
        return (self,) if self.sparse is None else (self, self.sparse)
