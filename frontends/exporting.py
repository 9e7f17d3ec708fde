"""The ladder of re-executable programs that ONNX files are made from.

Ways of exporting are tried in order, each compared with the model on the example and on other values. The first that
holds is the program of ``with_export``; whoever converts programs may ask for the next (``candidates``), because a
program that is right can still have no translation, or a wrong one. What was tried, and why it failed, is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from mfcompile.control_flow import eager_code
from mfcompile.errors import CaptureError
from mfcompile.frontends.exporting_inputs import (
    Axes,
    fixed_axes,
    only_axes,
    redraw,
    symbolic_axes,
    two_samples,
    wanted_axes,
)
from mfcompile.frontends.exporting_recorded import replayed_recording
from mfcompile.frontends.exporting_transformers import prepared_model
from mfcompile.frontends.module_calls import eval_mode
from mfcompile.frontends.traceable import Traceable
from mfcompile.frontends.without_cache import without_cache
from mfcompile.graph import CaptureAttempt, CapturedGraph, ExportedModel
from mfcompile.inputs import ExampleInputs, output_tensors
from mfcompile.module_copy import share_weights_copy

__all__ = ["candidates", "export_program", "redraw", "symbolic_axes", "wanted_axes"]

EXPORT_RTOL, EXPORT_ATOL = 1e-3, 1e-5
"""Exported programs may pick other kernels for attention than eager mode: float32 rounding, accumulated over layers."""

CAUTIOUS_DRAWS = 4
"""Other values that a program is checked on where the model reads numbers from its content and branches may follow."""

PREFILL = "a prefill graph: the model's cache is switched off (use_cache=False), so the file neither takes nor gives one"

ROWS_KEY, ROWS_FIXED = "mfcompile.rows", "fixed"
"""Metadata of a program that is right only for rows (masks, placeholders, sizes) as they are in the example."""

Candidate = tuple[CaptureAttempt, ExportedModel | None]


@dataclass(frozen=True)
class _Way:
    """One rung: ``make`` gives the module that torch.export traces, and what its notes say.

    Attributes:
        route: its name.
        cache: the model runs with its cache.
        axes: the dimensions that are left free.
        make: context over a module of our own -> what is traced.
        example: the inputs that it is traced with.
        why: what a dimension is fixed for, for the notes.
    """

    route: str
    cache: bool
    axes: Axes
    make: Callable[[nn.Module, ExampleInputs], contextlib.AbstractContextManager[Traceable]]
    example: ExampleInputs
    why: str = "the model computes with its value"


def export_program(captured: CapturedGraph) -> tuple[ExportedModel | None, tuple[CaptureAttempt, ...]]:
    """Export the captured model with free batch and sequence dimensions where it allows them.

    Args:
        captured: the captured model; its module is not changed.

    Returns:
        (the first program that holds, or None when every way failed; one attempt per way that was tried).
    """
    attempts: list[CaptureAttempt] = []
    for attempt, exported in candidates(captured):
        attempts.append(attempt)
        if exported is not None:
            return exported, tuple(attempts)
    return None, tuple(attempts)


def candidates(captured: CapturedGraph, after: str = "", first: str = "") -> Iterator[Candidate]:
    """Every way of exporting, in order, made when it is asked for.

    Args:
        captured: the captured model; its module is not changed.
        after: route of a way that was tried already, with all before it: start behind it.
        first: route of the way to start with.

    Yields:
        (the attempt, its program or None where it failed).
    """
    ways = _ways(captured)
    cached = _has_cache(captured.module)
    routes = [way.route for way in ways]
    tried: list[tuple[Any, ...]] = []
    start = routes.index(first) if first in routes else routes.index(after) + 1 if after in routes else 0
    for way in ways[start:]:
        kind = (way.make, way.cache or not cached, way.axes)
        if kind not in tried:  # a model without a cache is the same without it
            tried.append(kind)
            attempt, exported = _try(way, captured)
            if exported is not None and way.example is not captured.example_inputs and _fixes_the_batch(exported):
                attempt, exported = _try(_with_one_sample(way, captured.example_inputs), captured)
            yield attempt, exported


def _ways(captured: CapturedGraph) -> list[_Way]:
    inputs = captured.example_inputs
    doubled = two_samples(inputs)
    axes = wanted_axes(doubled)
    batch = only_axes(axes, "batch")
    recorded = "the recorded graph holds the shapes of the example"
    return [
        _Way("torch.export", True, axes, _as_it_is, doubled),
        _Way("torch.export without cache", False, axes, _as_it_is, doubled),
        _Way("torch.export, sequence fixed", False, batch, _as_it_is, doubled),
        _Way("torch.export, shapes fixed", False, {}, _as_it_is, inputs),
        _Way("transformers.exporters", False, axes, prepared_model, doubled),
        _Way("transformers.exporters, shapes fixed", False, {}, prepared_model, inputs),
        _Way("recorded graph", False, {}, replayed_recording, inputs, recorded),
    ]


def _fixes_the_batch(exported: ExportedModel) -> bool:
    """Some input takes as many samples as it was exported with, and no other number."""
    batch = only_axes(wanted_axes(exported.example_inputs), "batch")
    return any(0 not in exported.dynamic_axes.get(name, {}) for name in batch)


def _with_one_sample(way: _Way, inputs: ExampleInputs) -> _Way:
    """The same way for the user's one sample: a program that takes two samples and no fewer could not run the example."""
    axes = {name: {dim: axis for dim, axis in dims.items() if axis != "batch"} for name, dims in way.axes.items()}
    return replace(way, axes=axes, example=inputs)


def _try(way: _Way, captured: CapturedGraph) -> Candidate:
    started = time.perf_counter()

    def attempt(succeeded: bool, detail: str) -> CaptureAttempt:
        return CaptureAttempt(way.route, succeeded, detail, time.perf_counter() - started)

    cache = contextlib.nullcontext if way.cache else without_cache
    inputs, wanted = way.example, wanted_axes(way.example)
    try:
        module = share_weights_copy(captured.module)
        with eval_mode(module), _buffers_kept(module), cache(module):
            with way.make(module, inputs) as traced:
                program = _export(traced.module, inputs, way.axes)
            names, admits_rows = _check(program, module, inputs, traced.admits)
        fixed = fixed_axes(program, inputs, wanted, way.why)
        kept = symbolic_axes(program, inputs, way.axes)
    except Exception as error:  # torch.export raises many kinds; each is a reason to try the next way
        return attempt(False, _reason(error, captured.module)), None
    prefill = (PREFILL,) if not way.cache and _has_cache(captured.module) else ()
    notes = (*prefill, *fixed, *traced.notes)
    metadata = {} if admits_rows else {ROWS_KEY: ROWS_FIXED}
    exported = ExportedModel(program, way.route, inputs.names, names, kept, inputs, notes, metadata)
    return attempt(True, f"{len(program.graph.nodes)} nodes"), exported


@contextlib.contextmanager
def _as_it_is(module: nn.Module, _: ExampleInputs) -> Iterator[Traceable]:
    yield Traceable(module)


def _has_cache(module: nn.Module) -> bool:
    with without_cache(module) as changed:
        return bool(changed)


def _export(module: nn.Module, inputs: ExampleInputs, axes: Axes) -> ExportedProgram:
    # torch marks free dimensions on the tensors themselves, and a failed export leaves the marks: use others each time.
    inputs = inputs.map_tensors(lambda _, tensor: tensor.clone())
    signature = _spell_out_keywords(module, inputs)
    names = iter(inputs.names)

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        wanted = axes.get(next(names), {})
        return {dim: Dim.AUTO if dim in wanted else Dim.STATIC for dim in range(leaf.ndim)}

    args, kwargs = pytree.tree_map(dims, (inputs.args, inputs.kwargs))
    shapes = dict(signature.bind(*args, **kwargs).arguments) if axes else None
    # Before it fails, torch.export may print the whole graph to stderr; the error says what counts.
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)


def _spell_out_keywords(module: nn.Module, inputs: ExampleInputs) -> inspect.Signature:
    """Name the keywords that ``**kwargs`` of forward takes: torch.export gives them no free dimensions otherwise.

    Args:
        module: a module of our own; its forward is replaced by one that says what it takes.
        inputs: what it is called with.

    Returns:
        The signature of forward, without ``**kwargs``.
    """
    forward = module.forward
    signature = inspect.signature(forward)
    listed = {name: item for name, item in signature.parameters.items() if item.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(listed) < len(signature.parameters):
        extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs.kwargs if name not in listed]
        signature = signature.replace(parameters=[*listed.values(), *extra])

        def explicit(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        explicit.__signature__ = signature  # type: ignore[attr-defined]
        module.forward = explicit
    return signature


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back what the run of an exported program, or of the module, writes into buffers."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _check(
    program: ExportedProgram, module: nn.Module, inputs: ExampleInputs, admits: Callable[[ExampleInputs], bool]
) -> tuple[tuple[str, ...], bool]:
    """The program must give what the model gives, on the example and on other values in the same places.

    Returns:
        Names of the outputs, and whether rows may be others than those of the example.

    Raises:
        CaptureError: an output differs.
    """
    runnable = program.module()
    names = _compare(runnable, inputs, _outputs(module, inputs), "the example")
    for rows, draws in ((True, 1), (False, 1), (False, CAUTIOUS_DRAWS)):
        others = [redraw(inputs, rows=rows, seed=seed) for seed in range(draws)]
        try:
            expected = [_outputs(module, other) for other in others]
            is_admitted = all(admits(other) for other in others)
        except Exception:  # the model refuses rows that swapped places: placeholders and sizes must fit each other
            continue
        if is_admitted or draws > 1:
            for other, values in zip(others, expected, strict=True):
                _compare(runnable, other, values, "other values")
            return names, rows
    return names, False


def _outputs(module: nn.Module, inputs: ExampleInputs) -> dict[str, Tensor]:
    with torch.no_grad(), eager_code():
        return output_tensors(inputs.call(module))


def _compare(runnable: nn.Module, inputs: ExampleInputs, expected: dict[str, Tensor], case: str) -> tuple[str, ...]:
    found = _outputs(runnable, inputs)
    if list(expected) != list(found):
        raise CaptureError(f"the exported program returns {list(found)}, the model {list(expected)}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape or not torch.allclose(
            _wide(tensor), _wide(found[name]), rtol=EXPORT_RTOL, atol=EXPORT_ATOL, equal_nan=True
        ):
            raise CaptureError(f"the exported program gives another {name} than the model on {case}")
    return tuple(expected)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_complex() else tensor.double()


def _reason(error: BaseException, module: nn.Module) -> str:
    """The first lines of an error, and the line of the model's own code that it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = _model_line(error, module)
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}{f' (at {where})' if where else ''}"


def _model_line(error: BaseException, module: nn.Module) -> str:
    """The innermost frame in a file that defines one of the model's modules, torch's own aside."""
    names = {type(item).__module__ for item in module.modules()}
    sources = [sys.modules[name] for name in names if name.partition(".")[0] != "torch" and name in sys.modules]
    files = {getattr(source, "__file__", None) for source in sources}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not frames:
        return ""
    last = frames[-1]
    return f"{Path(last.filename).name}:{last.lineno}, in {last.name}: {last.line}"
