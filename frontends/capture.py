"""capture(): a model and example inputs become a CapturedGraph, whatever the model is."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.errors import CaptureError, InputError
from mfcompile.frontends.exporting import export_program
from mfcompile.frontends.program_module import ProgramModule, program_module
from mfcompile.frontends.recorder import Recording, record, replay, tensor_aliases
from mfcompile.frontends.remembering import read_again
from mfcompile.frontends.repeating import find_differences
from mfcompile.frontends.unwrapping import check_devices, unwrap
from mfcompile.frontends.without_weights import has_no_values
from mfcompile.graph import CaptureAttempt, CapturedGraph
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.module_copy import share_weights_copy

REPLAY_RTOL, REPLAY_ATOL = 1e-4, 1e-5
"""A recorded graph runs the same kernels in the same order; this leaves room for reductions over threads only."""

_SEED = 0
"""Both runs draw the same random numbers, so that a model that draws some can be compared with its recording."""


def capture(model: nn.Module, example_inputs: Any, *, export: bool = False) -> CapturedGraph:
    """Capture a model as a graph of aten operators, by running it once.

    The model is not changed: it is run in eval mode on a second module object that shares its weights. The recorded
    graph is replayed and must give what the model gives. Wrappers (torch.compile, data-parallel classes) are taken off. A
    model with weights on the meta device gives a plan: a graph for regions and pictures, which nothing can be run with.

    Args:
        model: any ``nn.Module`` that runs eagerly on the inputs.
        example_inputs: a tensor, a tuple, or a mapping of keyword arguments; None values are allowed.
        export: also make the re-executable torch.export program that ONNX files are made from (``with_export``).

    Returns:
        The recorded graph, with what was tried and what it is specialised to.

    Raises:
        InputError: the inputs do not fit the model's forward.
        CaptureError: the model does not run, or its recording does not replay.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = program_module(model)
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model, unwrapped = unwrap(model)
    check_devices(model)
    is_plan = has_no_values(model)
    if isinstance(model, ProgramModule) and example_inputs is None:
        example_inputs = model.own_inputs()
        if example_inputs is None:
            raise InputError(
                "the program of torch.export holds no example inputs, and none were given: it cannot be run. Give some "
                "(--calibration batches.npz, or a model.py with model = torch.export.load(...) and example_inputs = {...})"
            )
    inputs = normalize_inputs(model, example_inputs)
    _refuse_inputs_without_values(inputs)
    started = time.perf_counter()
    remembered: tuple[str, ...] = ()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        second = _second_object(model)
        recording = record(second, inputs)
        torch.manual_seed(_SEED)
        is_pure = isinstance(model, ProgramModule) and not recording.written  # it remembers nothing, and repeats itself
        if not is_plan and not is_pure:
            recording, third, remembered = read_again(recording, inputs, lambda: _third_object(model, second), _agrees)
            second = third or second
            torch.manual_seed(_SEED)
        if is_plan:
            detail = f"{len(recording.graph_module.graph.nodes)} nodes; nothing was computed with weights, nothing is compared"
        else:
            detail = _check_replay(model, recording, inputs)
            if not is_pure:
                unwrapped = (*unwrapped, *find_differences(model, second, recording, inputs, _SEED))
    attempt = CaptureAttempt("record", True, detail, time.perf_counter() - started)
    captured = CapturedGraph(
        graph_module=recording.graph_module,
        module=model,
        example_inputs=inputs,
        inputs=recording.inputs,
        output_names=recording.output_names,
        parameter_nodes=recording.parameter_nodes,
        aliases=tensor_aliases(model),
        frontend="record",
        specialised=(*_specialised(recording), *unwrapped, *_describe_remembered(remembered)),
        baked_scalars=recording.baked_scalars,
        attempts=(attempt,),
        remembered=remembered,
        versions=_versions(),
    )
    if isinstance(model, ProgramModule):
        captured = replace(captured, exported=model.exported(inputs, recording.output_names))
    return with_export(captured) if export else captured


def with_export(captured: CapturedGraph) -> CapturedGraph:
    """Add the torch.export program to a captured graph, with what was tried to get it.

    Returns:
        The graph with ``exported`` set, or, when no way of exporting succeeded, without it and with the reasons in
        ``attempts``.
    """
    if captured.exported is not None or any(item.frontend.startswith("torch.export") for item in captured.attempts):
        return captured  # what failed once fails again
    exported, attempts = export_program(captured)
    return replace(captured, exported=exported, attempts=(*captured.attempts, *attempts))


def _describe_remembered(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"a call that reads {', '.join(names)}: the model remembers what an earlier call made of it, the graph computes it",
    )


def _refuse_inputs_without_values(inputs: ExampleInputs) -> None:
    for name, tensor in inputs.tensors().items():
        if tensor.device.type == "meta":
            raise InputError(
                f"the example input {name} {tuple(tensor.shape)} is on the meta device: masks, positions and numbers of "
                f"tokens are read from inputs, even where weights have no values. Make it outside of torch.device('meta')"
            )


def _second_object(model: nn.Module) -> nn.Module:
    """The model in a second object, so that caches filled by the run stay out of the user's; itself if that fails."""
    try:
        return share_weights_copy(model)
    except Exception:  # deepcopy runs arbitrary code of the user's attributes
        return model


def _third_object(model: nn.Module, second: nn.Module) -> nn.Module | None:
    """One more object to run; None where the model could not be copied, and another run would leave traces in it."""
    return None if second is model else _second_object(model)


def _check_replay(model: nn.Module, recording: Recording, inputs: ExampleInputs) -> str:
    """Run the recording on the example and compare with what the model gave.

    Raises:
        CaptureError: an output differs; the recording would prune another model than the user's.
    """
    again = replay(recording.graph_module, inputs)
    worst = 0.0
    for (name, expected), found in zip(recording.outputs.items(), again, strict=True):
        if not _agrees(expected, found):
            raise CaptureError(
                f"{type(model).__name__} was recorded, but its recording gives another {name} {tuple(expected.shape)}: the "
                f"model draws random numbers or keeps state between calls in eval mode. Seed inside forward, or reset the state"
            )
        if expected.is_floating_point() and expected.numel():
            worst = max(worst, float((expected.double() - found.double()).detach().abs().nan_to_num().max()))
    return f"{len(recording.graph_module.graph.nodes)} nodes; its replay differs from the model by at most {worst:.1e}"


def _agrees(expected: Tensor, found: Tensor) -> bool:
    return expected.shape == found.shape and torch.allclose(
        expected.double() if not expected.is_complex() else expected,
        found.double() if not found.is_complex() else found,
        rtol=REPLAY_RTOL,
        atol=REPLAY_ATOL,
        equal_nan=True,
    )


def _specialised(recording: Recording) -> tuple[str, ...]:
    notes = ["the shapes of the example inputs"]
    from_input = [scalar for scalar in recording.baked_scalars if scalar.from_input]
    if from_input:
        where = ", ".join(dict.fromkeys(scalar.module for scalar in from_input[:5]))
        notes.append(f"{len(from_input)} numbers that the model read from its inputs (in {where})")
    if recording.random_operators:
        notes.append(f"nothing random: {recording.random_operators} operators draw new random numbers at every run")
    if recording.control_flow:
        notes.append(f"the branches and rounds that the example takes in {', '.join(recording.control_flow[:5])}")
    if recording.lifted_constants:
        notes.append(f"{recording.lifted_constants} tensors that are neither parameters nor buffers, kept as constants")
    return tuple(notes)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("mfcompile", "torch", "transformers", "onnx", "onnxruntime"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
