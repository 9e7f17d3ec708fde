"""The torch.export rung: the re-executable program that ONNX files are made from.

Several ways are tried in order, each compared with the model on the example and on other values; what was tried and
why it failed is kept.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from mfcompile.errors import CaptureError
from mfcompile.frontends.module_calls import eval_mode
from mfcompile.graph import CaptureAttempt, CapturedGraph, ExportedModel
from mfcompile.inputs import ExampleInputs, output_tensors, slice_batch
from mfcompile.module_copy import share_weights_copy

EXPORT_RTOL, EXPORT_ATOL = 1e-3, 1e-5
"""Exported programs may pick other kernels for attention than eager mode: float32 rounding, accumulated over layers."""

Axes = dict[str, dict[int, str]]


def export_program(captured: CapturedGraph) -> tuple[ExportedModel | None, tuple[CaptureAttempt, ...]]:
    """Export the captured model with free batch and sequence dimensions where it allows them.

    Args:
        captured: the captured model; its module is not changed.

    Returns:
        (the program, or None when every way failed; one attempt per way that was tried).
    """
    inputs = _two_samples(captured.example_inputs)
    axes = wanted_axes(inputs)
    ways: list[tuple[str, Axes, Callable[[nn.Module], Any]]] = [
        ("torch.export", axes, contextlib.nullcontext),
        ("torch.export without cache", axes, _without_cache),
        ("torch.export, sequence fixed", _only(axes, "batch"), _without_cache),
        ("torch.export, shapes fixed", {}, _without_cache),
    ]
    attempts: list[CaptureAttempt] = []
    for route, dims, context in ways:
        started = time.perf_counter()
        try:
            module = share_weights_copy(captured.module)
            with eval_mode(module), _buffers_kept(module), context(module):
                program = _export(module, inputs, dims)
                names = _check(program, module, inputs)
            notes = _fixed(program, inputs, axes)
            kept = symbolic_axes(program, inputs, axes)
        except Exception as error:  # torch.export raises many kinds; each is a reason to try the next way
            attempts.append(CaptureAttempt(route, False, _first_lines(error), time.perf_counter() - started))
            continue
        attempts.append(CaptureAttempt(route, True, f"{len(program.graph.nodes)} nodes", time.perf_counter() - started))
        return ExportedModel(program, route, inputs.names, names, kept, inputs, notes), tuple(attempts)
    return None, tuple(attempts)


def wanted_axes(inputs: ExampleInputs) -> Axes:
    """Input name -> dimension -> axis name: dimension 0 is the batch where all inputs agree, dimension 1 of integer inputs
    is a sequence, shared by every input that has that size there.
    """
    tensors = inputs.tensors()
    axes: Axes = {name: {} for name in tensors}
    if inputs.batch_size() is not None:
        for name, tensor in tensors.items():
            if tensor.ndim:
                axes[name][0] = "batch"
    lengths: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not tensor.is_floating_point() and 0 in axes[name]:
            axis = lengths.setdefault(tensor.shape[1], "sequence" if not lengths else f"sequence_{len(lengths)}")
            axes[name][1] = axis
    return {name: dims for name, dims in axes.items() if dims}


def symbolic_axes(program: ExportedProgram, inputs: ExampleInputs, axes: Axes) -> Axes:
    """The wanted axes that the program really leaves free."""
    values = _placeholder_values(program, inputs)
    kept: Axes = {}
    for name, dims in axes.items():
        free = {dim: axis for dim, axis in dims.items() if name in values and _is_free(values[name].shape[dim])}
        if free:
            kept[name] = free
    return kept


def _is_free(size: Any) -> bool:
    """A size that is still a symbol; a SymInt may have become a number on the way."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _fixed(program: ExportedProgram, inputs: ExampleInputs, axes: Axes) -> tuple[str, ...]:
    kept = symbolic_axes(program, inputs, axes)
    tensors = inputs.tensors()
    return tuple(
        f"dimension {dim} ({axis}) of {name} is fixed to {tensors[name].shape[dim]}: the model computes with its value"
        for name, dims in axes.items()
        for dim, axis in dims.items()
        if dim not in kept.get(name, {})
    )


def _only(axes: Axes, wanted: str) -> Axes:
    return {name: {dim: axis for dim, axis in dims.items() if axis == wanted} for name, dims in axes.items()}


def _placeholder_values(program: ExportedProgram, inputs: ExampleInputs) -> dict[str, Tensor]:
    users = [name for name in program.graph_signature.user_inputs if isinstance(name, str)]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[name].meta["val"] for name in users if isinstance(nodes[name].meta.get("val"), Tensor)]
    return dict(zip(inputs.names, values, strict=True))


def _two_samples(inputs: ExampleInputs) -> ExampleInputs:
    """A batch of one is repeated to two: torch.export takes a size of one for a constant."""
    return slice_batch(inputs, [0, 0]) if inputs.batch_size() == 1 else inputs


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


def _check(program: ExportedProgram, module: nn.Module, inputs: ExampleInputs) -> tuple[str, ...]:
    """The program must give what the model gives, on the example and on other values in the same places.

    Returns:
        Names of the outputs.

    Raises:
        CaptureError: an output differs.
    """
    runnable = program.module()
    names: tuple[str, ...] = ()
    for case, sample in (("the example", inputs), ("other values", redraw(inputs))):
        with torch.no_grad():
            expected = output_tensors(sample.call(module))
            found = output_tensors(sample.call(runnable))
        if list(expected) != list(found):
            raise CaptureError(f"the exported program returns {list(found)}, the model {list(expected)}")
        for name, tensor in expected.items():
            if tensor.shape != found[name].shape or not torch.allclose(
                tensor.double(), found[name].double(), rtol=EXPORT_RTOL, atol=EXPORT_ATOL, equal_nan=True
            ):
                raise CaptureError(f"the exported program gives another {name} than the model on {case}")
        names = tuple(expected)
    return names


def redraw(inputs: ExampleInputs) -> ExampleInputs:
    """Other values with the statistics of the example: float inputs are drawn anew, samples of the others swap places."""
    generator = torch.Generator().manual_seed(0)
    batch = inputs.batch_size()

    def change(_: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.numel() > 1:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            return noise * tensor.std() + tensor.mean()
        return tensor.roll(1, 0) if batch is not None and tensor.ndim else tensor

    return inputs.map_tensors(change)


@contextlib.contextmanager
def _without_cache(module: nn.Module) -> Iterator[None]:
    """Switch ``use_cache`` off in every configuration object that the module holds, and back on afterwards."""
    changed: list[Any] = []
    seen: set[int] = set()

    def visit(config: Any) -> None:
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            return
        seen.add(id(config))
        if vars(config).get("use_cache") is True or getattr(config, "use_cache", None) is True:
            config.use_cache = False
            changed.append(config)
        for value in list(vars(config).values()):
            if type(value).__module__ == type(config).__module__ or type(value).__name__.endswith("Config"):
                visit(value)

    for item in module.modules():
        visit(getattr(item, "config", None))
        visit(getattr(item, "generation_config", None))
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
