"""onnxruntime against PyTorch: does the written file compute what the masked module computes?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from mfcompile.artifact import ExportedArtifact, OutputParity, ParityReport
from mfcompile.control_flow import eager_code
from mfcompile.errors import InputError, ParityError
from mfcompile.exporters.messages import first_line
from mfcompile.exporters.session import make_feeds, open_session, reads_sparsely, run_session
from mfcompile.exporters.tolerances import WORLDS_SHARE, Tolerance, default_tolerance, is_of_range
from mfcompile.inputs import ExampleInputs, output_tensors, slice_batch

__all__ = [
    "comparable_batch_sizes",
    "default_tolerance",
    "is_of_range",
    "make_cases",
    "open_session",
    "raise_on_failure",
    "read_metadata",
    "runnable_cases",
    "verify",
]

# Metadata of a file that is right only for rows (masks, placeholders, sizes) as they are in the example.
ROWS_KEY, ROWS_FIXED = "mfcompile.rows", "fixed"

# A float input with at most this many different values is a mask or a flag, not content.
MASK_VALUES = 2

# An output whose largest value is below one gets an atol of that share, but not less than this one: below it, what is
# left of sums that cancel is rounding.
SMALLEST_SCALE = 1e-2


@dataclass
class _Comparison:
    """Running comparison of one output over all cases."""

    name: str
    max_abs_diff: float = 0.0
    max_abs: float = 0.0
    within: bool = True
    reason: str = ""

    def fail(self, reason: str) -> None:
        self.max_abs_diff, self.within = float("inf"), False
        self.reason = self.reason or reason

    def result(self) -> OutputParity:
        return OutputParity(self.name, self.max_abs_diff, self.max_abs, self.within)


@dataclass
class _Runtime:
    """A session and how well it does so far.

    Attributes:
        addition: what onnxruntime runs with, in words; "" for stock onnxruntime.
        session: of the file.
        comparisons: output name -> its comparison.
    """

    addition: str
    session: Any
    comparisons: dict[str, _Comparison] = field(default_factory=dict)

    def compare(self, number: int, case: ExampleInputs, expected: dict[str, Tensor], tolerance: Tolerance) -> dict[str, Tensor]:
        """Run one case and compare every output; what it computed, {} where it fails."""
        for name in expected:
            self.comparisons.setdefault(name, _Comparison(name))
        feeds, _ = make_feeds(self.session, case)
        try:
            actual = run_session(self.session, feeds)
        except Exception as error:
            for name in expected:
                self.comparisons[name].fail(
                    f"onnxruntime{self.addition} fails on case {number} ({describe(case)}): {first_line(error)}"
                )
            return {}
        _compare_case(expected, actual, self.comparisons, tolerance)
        return actual

    def compare_worlds(self, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
        """Hold what it computed to what stock onnxruntime did."""
        apart = {name: _Comparison(name) for name in expected}
        _compare_case(expected, actual, apart, Tolerance(0.0, WORLDS_SHARE, True))
        for name, item in apart.items():
            own = self.comparisons.get(name.removesuffix("_out"), self.comparisons.get(name))
            if own is not None and not item.within:
                reason = f"{item.max_abs_diff:.3g} away from stock onnxruntime, of a range of {item.max_abs:.3g}"
                own.within, own.reason = False, own.reason or item.reason or reason

    def notes(self) -> tuple[str, ...]:
        """Why outputs are outside, where there is more to say than a number."""
        return tuple(f"output {item.name}: {item.reason}" for item in self.comparisons.values() if item.reason)

    def report(self, shared: ParityReport) -> ParityReport:
        """Its report; what all runtimes have in common is taken from another."""
        outputs = tuple(item.result() for item in self.comparisons.values())
        return replace(
            shared, outputs=outputs, runtime=f"onnxruntime {onnxruntime.__version__}{self.addition}", notes=self.notes()
        )


def verify(
    artifact: ExportedArtifact | Path | str,
    module: nn.Module,
    cases: Sequence[ExampleInputs],
    *,
    rtol: float,
    atol: float,
    of_range: bool = False,
    library: str | None = None,
    missing: str | None = None,
) -> ParityReport:
    """Compare every output of the file with the module's, on every case, in stock onnxruntime and with the sparse kernels.

    An output agrees where |onnxruntime - PyTorch| <= atol + rtol |PyTorch| for every element, NaN and infinities are
    at the same places, and shape and dtype are equal. For an output whose values are all small, atol is scaled by the
    largest of them (by 0.01 at least): a tolerance of the size of the values would accept anything.
    Integer and bool outputs must be equal, whatever the tolerance.
    The module runs in eval mode without gradients, on the device of the inputs, and gets its training mode back.

    Args:
        artifact: what export_onnx returned, or the path of an .onnx file.
        module: the masked module.
        cases: inputs to compare on; usually of two batch sizes. See make_cases.
        rtol: relative tolerance, see default_tolerance.
        atol: absolute tolerance.
        of_range: atol is a share of the largest magnitude of each output (of 0.01 at least), see is_of_range. The sparse
            kernels are then held to stock onnxruntime as well, within WORLDS_SHARE.
        library: path of the library of ``mfcompile.runtime``, which a file with sparse layers is run with as well; None
            leaves that out.
        missing: why there is no library, for a note.

    Returns:
        A report, whether or not the outputs agree; an output that is missing or cannot be computed is a failure with
        a note. See raise_on_failure.

    Raises:
        InputError: there are no cases, the file cannot be loaded, or it has inputs that the cases lack.
    """
    if not cases:
        raise InputError("no inputs to compare the artefact on; pass at least one case")
    path = artifact.path if isinstance(artifact, ExportedArtifact) else Path(artifact)
    stock = _Runtime("", open_session(path))
    is_sparse = reads_sparsely(stock.session)
    runtimes = [stock]
    if is_sparse and library is not None:
        runtimes.append(_Runtime(" with mfcompile.runtime", open_session(path, library=library)))
    notes: dict[str, None] = {}
    for number, case in enumerate(cases, start=1):
        _, absent = make_feeds(stock.session, case)
        notes.update(dict.fromkeys(f"input {name} is not in the ONNX graph" for name in absent))
        with _inference(module):
            expected = output_tensors(case.call(module))
        expected = {name: tensor.detach().cpu() for name, tensor in expected.items()}
        computed = [runtime.compare(number, case, expected, Tolerance(rtol, atol, of_range)) for runtime in runtimes]
        if of_range and len(computed) == 2 and all(computed):
            runtimes[1].compare_worlds(*computed)
    if is_sparse and library is None and missing:
        notes[f"not compared with mfcompile.runtime, which is not available: {missing}"] = None
    sizes = (case.batch_size() for case in cases)
    shared = ParityReport(
        outputs=(),
        rtol=rtol,
        atol=atol,
        batch_sizes=tuple(dict.fromkeys(size for size in sizes if size is not None)),
        cases=tuple(describe(case) for case in cases),
        runtime="",
        reference=getattr(module, "parity_reference", "PyTorch"),
    )
    reports = [runtime.report(shared) for runtime in runtimes]
    return replace(reports[0], notes=(*notes, *reports[0].notes), sparse=reports[1] if len(reports) > 1 else None)


def raise_on_failure(report: ParityReport) -> None:
    """Do nothing for a report that passed.

    Raises:
        ParityError: names every output that disagrees, by how much, and the tolerance.
    """
    if report.passed:
        return
    failed = next((item for item in report.reports if any(not output.within for output in item.outputs)), report)
    wrong = [output for output in failed.outputs if not output.within]
    lines = [f"  {output.name}: off by {output.max_abs_diff:.3g} (largest value {output.max_abs:.3g})" for output in wrong]
    lines += [f"  {note}" for note in failed.notes]
    raise ParityError(
        f"{failed.runtime} and the masked module disagree in {len(wrong)} of {len(failed.outputs)} outputs beyond "
        f"rtol={report.rtol:g}, atol={report.atol:g}:\n" + "\n".join(lines) + "\n"
        "Do not use the file. If the differences are rounding, pass a wider tolerance; otherwise export again"
    )


def make_cases(
    example_inputs: ExampleInputs, *, seed: int, batch_sizes: Sequence[int] = (), count: int = 1, rows: bool = True
) -> tuple[ExampleInputs, ...]:
    """Inputs that the export has not seen, with the structure of the example.

    Rows of the example are drawn for each batch size: integers, bools and masks keep whole rows together, so
    placeholder tokens, padding and their masks stay consistent. Float content is drawn anew from a normal
    distribution with the example's mean and standard deviation, within the example's range. Inputs without a common
    batch dimension give one case at the example's size, with only the float content drawn anew.

    Args:
        example_inputs: what the model was captured with.
        seed: of the draws; the same seed gives the same cases.
        batch_sizes: a case for each; empty: the example's own size.
        count: cases per batch size.
        rows: False keeps every row where it is, at the example's size: only float content is drawn anew.
    """
    generator = torch.Generator().manual_seed(seed)
    own = example_inputs.batch_size() if rows else None
    sizes: list[int | None] = [None] if not own else [*(batch_sizes or (own,))]
    cases = []
    for size in [size for size in sizes for _ in range(count)]:
        case = example_inputs
        if size is not None and own is not None:
            order = torch.randperm(own, generator=generator).tolist()
            case = slice_batch(example_inputs, [order[index % own] for index in range(size)])
        cases.append(case.map_tensors(lambda name, tensor: _redraw(example_inputs.tensors()[name], tensor, generator)))
    return tuple(cases)


def runnable_cases(
    artifact: ExportedArtifact | Path | str, module: nn.Module, example_inputs: ExampleInputs, *, seed: int, least: int = 1
) -> tuple[ExampleInputs, ...]:
    """Cases that an artefact can be held to: within what the file says it is right for, and accepted by the module.

    Args:
        artifact: what export_onnx returned, or the path of an .onnx file.
        module: the module that it is compared with.
        example_inputs: what the cases are drawn from.
        seed: of the draws.
        least: number of cases at least.

    Returns:
        Cases of make_cases: rows are drawn unless the file's metadata say that it is right for the example's rows only,
        or the module raises on other rows (images of several sizes, placeholders that must fit them).
    """
    if read_metadata(artifact).get(ROWS_KEY) != ROWS_FIXED:
        sizes = comparable_batch_sizes(artifact, example_inputs)
        cases = make_cases(example_inputs, seed=seed, batch_sizes=sizes, count=-(-least // max(1, len(sizes))))
        try:
            with _inference(module):
                for case in cases:
                    case.call(module)
        except Exception:  # model code raises anything; rows that do not fit together are no inputs of this model
            pass
        else:
            return cases
    return make_cases(example_inputs, seed=seed, count=least, rows=False)


def read_metadata(artifact: ExportedArtifact | Path | str) -> dict[str, str]:
    """What an ONNX file says of itself.

    Raises:
        InputError: there is no such file, or onnxruntime cannot load it.
    """
    session = open_session(artifact.path if isinstance(artifact, ExportedArtifact) else artifact)
    return dict(session.get_modelmeta().custom_metadata_map)


def comparable_batch_sizes(artifact: ExportedArtifact | Path | str, example_inputs: ExampleInputs) -> tuple[int, ...]:
    """Batch sizes to verify an artefact at, for make_cases: the example's and one more where the batch is free.

    Where the batch is fixed to another size than the example's (a batch of one is exported as two), that size is it.

    Args:
        artifact: what export_onnx returned, or the path of an .onnx file.
        example_inputs: what the comparison is drawn from.

    Returns:
        () where the inputs share no batch dimension.
    """
    own = example_inputs.batch_size()
    if own is None:
        return ()
    path = artifact.path if isinstance(artifact, ExportedArtifact) else artifact
    sizes = {item.shape[0] for item in open_session(path).get_inputs() if item.shape}
    fixed = [size for size in sizes if isinstance(size, int)]
    return (fixed[0],) if fixed else (own, own + 1)


def describe(case: ExampleInputs) -> str:
    """Names and shapes of the inputs, in one line."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in case.tensors().items())


def _compare_case(
    expected: dict[str, Tensor], actual: dict[str, Tensor], comparisons: dict[str, _Comparison], tolerance: Tolerance
) -> None:
    for name, reference in expected.items():
        item = comparisons[name]
        value = actual.get(name, actual.get(f"{name}_out"))  # "_out": see exporters.onnx_names
        if value is None:
            item.fail(f"the ONNX graph has no such output; it has {', '.join(actual)}")
        elif value.shape != reference.shape:
            item.fail(f"shape {tuple(value.shape)} in onnxruntime, {tuple(reference.shape)} in PyTorch")
        elif value.dtype != reference.dtype:
            item.fail(f"dtype {value.dtype} in onnxruntime, {reference.dtype} in PyTorch")
        else:
            _compare(item, value, reference, *tolerance)


def _compare(item: _Comparison, value: Tensor, reference: Tensor, rtol: float, atol: float, of_range: bool = False) -> None:
    if not reference.numel():
        return
    if not reference.is_floating_point() and not reference.is_complex():
        rtol = atol = 0.0
    wide = torch.complex128 if reference.is_complex() else torch.float64
    left, right = value.to(wide), reference.to(wide)
    finite = torch.isfinite(right)
    both_nan = torch.isnan(left) & torch.isnan(right)
    same = torch.where(finite, torch.isfinite(left), both_nan | (left == right))
    difference = (left - right).abs()[finite & torch.isfinite(left)]
    largest = float(right[finite].abs().max()) if finite.any() else 0.0
    item.max_abs = max(item.max_abs, largest)
    scale = max(largest, SMALLEST_SCALE) if of_range else min(1.0, max(largest, SMALLEST_SCALE))
    allowed = (atol * scale + rtol * right.abs())[finite & torch.isfinite(left)]
    if difference.numel():
        item.max_abs_diff = max(item.max_abs_diff, float(difference.max()))
        item.within = item.within and bool((difference <= allowed).all())
    if not bool(same.all()):
        item.fail(f"NaN or infinity at {int((~same).sum())} places on one side only")


def _redraw(example: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """``rows`` with float content drawn anew; masks, integers and columns of whole numbers (coordinates) as they are."""
    if not example.is_floating_point() or not bool(torch.isfinite(example).all()) or _is_mask(example):
        return rows
    wide = example.double()
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * wide.std().cpu() + wide.mean().cpu()
    drawn = drawn.clamp(float(wide.min()), float(wide.max()))
    drawn = drawn.to(dtype=rows.dtype, device=rows.device)
    whole = (example == example.round()).reshape(-1, example.shape[-1]).all(0) if example.ndim > 1 else None
    return drawn if whole is None or whole.all() else torch.where(whole, rows, drawn)


def _is_mask(example: Tensor) -> bool:
    return int(torch.unique(example).numel()) <= MASK_VALUES


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no fused layers; every submodule gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), eager_code():
            yield
    finally:
        for part, mode in modes:
            part.training = mode
