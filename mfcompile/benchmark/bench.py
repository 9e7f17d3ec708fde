"""bench: one pruned model in all its forms, run in turns on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfcompile import runtime
from mfcompile.benchmark.cost import measure_cost
from mfcompile.benchmark.machine import busy_notes, describe_machine, usable_cores
from mfcompile.benchmark.result import Benchmark, Failure, MeasuredVariant, SessionCost, Timing
from mfcompile.benchmark.sizes import SizedInputs, declared_shapes, free_axes, sized_inputs, with_inputs_of
from mfcompile.benchmark.timing import Clock, SessionFile, first_line, measure
from mfcompile.benchmark.variants import (
    CapturedForms,
    FileForms,
    FormSource,
    PreparedVariant,
    choose_variants,
    prepare_variants,
)
from mfcompile.compile import Progress
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs
from mfcompile.session import TORCH_DTYPES, make_feeds

MOST_DEFAULT_THREADS = 8


def bench(
    model: CapturedGraph | Path | str,
    example_inputs: Any = None,
    *,
    variants: Sequence[str] | None = None,
    batch: Sequence[int] = (1,),
    tokens: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    rounds: int | None = None,
    cost: bool = True,
    progress: Progress | None = None,
) -> Benchmark:
    """Measure one pruned model dense, packed, with the sparse runtime and in int8, in turns in one process.

    What is faster is said by ratios of runs that stood side by side, with their quartiles; a form that there is none of, or
    that does not run, stands in the result with its reason.

    Args:
        model: a captured model with masks (``CompiledModel.captured``, ``apply_masks``), or the path of a pruned .onnx file,
            packed or dense, or of a directory that ``mfcompile prune`` wrote.
        example_inputs: a mapping input -> tensor, for a file; None makes random ones up from the types of its inputs.
        variants: names of the forms ("dense", "packed", "decoded", "runtime", "int8", "int8-runtime"); None for all.
        batch: batch sizes; empty for that of the examples.
        tokens: lengths of the free sequence dimensions; None for 1, 8, 32 and 197, empty for that of the examples.
        threads: numbers of threads inside one operator; None for one, and all cores up to eight.
        rounds: how often every form has its turn at every size; None for what fits into about six seconds.
        cost: also measure memory, loading and first run, each in processes of its own.
        progress: called with (stage, done, total).

    Raises:
        InputError: an argument is not usable, the model is not pruned, or no form of it runs at any size.
    """
    choose_variants(variants)
    counts = _check_counts(threads, rounds)
    step = progress or _silent
    with tempfile.TemporaryDirectory(prefix="mfcompile-bench-") as folder:
        source, description, examples = _open(model, example_inputs, Path(folder))
        prepared = prepare_variants(source, variants, lambda done, total: step("variants", done, total))
        files = [item.file for item in prepared if item.file is not None]
        if not files:
            raise InputError(
                "there is no form to measure: " + "; ".join(f"{item.variant.name}: {item.reason}" for item in prepared)
            )
        if examples is None:
            examples = _made_up(source, files)
        machine = describe_machine(runtime.instruction_set() if runtime.is_available() else None)
        sizes, notes = _sizes(files, examples, batch, tokens, counts[0])
        return _measure(prepared, files, sizes, counts, rounds, cost, description, machine, notes, step)


def _measure(
    prepared: Sequence[PreparedVariant],
    files: Sequence[SessionFile],
    sizes: Sequence[SizedInputs],
    threads: Sequence[int],
    rounds: int | None,
    cost: bool,
    description: dict[str, Any],
    machine: dict[str, Any],
    notes: Sequence[str],
    step: Progress,
) -> Benchmark:
    clock, baseline = Clock(), files[0].name
    timings: list[Timing] = []
    failures: list[Failure] = []
    total = len(sizes) * len(threads)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        step("latency", done, total)

    step("latency", 0, total)
    for count in threads:
        found = measure(
            files, sizes, baseline=baseline, threads=count, rounds=rounds, clock=clock, progress=advance
        )  # fmt: skip
        timings += found.timings
        failures += found.failures
    ran = {timing.variant for timing in timings}
    costs: dict[str, SessionCost | str] = {}
    for index, file in enumerate(files if cost else ()):
        step("cost", index, len(files))
        if file.name in ran:
            costs[file.name] = _cost(file, sizes[-1].inputs, threads[0])
    step("cost", len(files), len(files))
    told = [f"memory and loading of {name}: {item}" for name, item in costs.items() if isinstance(item, str)]
    return Benchmark(
        model=description,
        variants=tuple(_measured(item, costs, ran, failures) for item in prepared),
        baseline=baseline,
        sizes=tuple(sized.size for sized in sizes),
        timings=tuple(timings),
        machine={**machine, "stretch": None if clock.stretch is None else round(clock.stretch, 3)},
        failures=tuple(failures),
        notes=(*notes, *busy_notes(machine, clock.stretch), *told),
    )


def _measured(
    item: PreparedVariant, costs: dict[str, SessionCost | str], ran: set[str], failures: Sequence[Failure]
) -> MeasuredVariant:
    name, reason = item.variant.name, item.reason
    if reason is None and name not in ran:
        reason = next((failure.reason for failure in failures if failure.variant == name), "it did not run")
    found = costs.get(name)
    return MeasuredVariant(
        name, item.variant.description, item.size_bytes, found if isinstance(found, SessionCost) else None, reason
    )


def _cost(file: SessionFile, inputs: ExampleInputs, threads: int) -> SessionCost | str:
    """What a session costs, or why that is not known."""
    try:
        session = file.open(threads)
        dtypes = {node.name: TORCH_DTYPES[node.type] for node in session.get_inputs()}
        del session
        fed = with_inputs_of(inputs, list(dtypes)).map_tensors(lambda name, tensor: tensor.to(dtypes[name]))
        return measure_cost(file, fed, threads=threads)
    except InputError as error:
        return first_line(error)


def _open(model: Any, example_inputs: Any, folder: Path) -> tuple[FormSource, dict[str, Any], ExampleInputs | None]:
    """Where forms come from, what the model is, and inputs where there are some."""
    if isinstance(model, CapturedGraph):
        if model.masks is None:
            raise InputError(
                f"{type(model.module).__name__} has no masks: nothing in it is sparse. Prune it first (compile_pruned)"
            )
        masks = model.masks
        description = {
            "name": type(model.module).__name__,
            "pruned_weights": masks.weight_count,
            "sparsity": round(1 - masks.kept_count / max(masks.weight_count, 1), 4),
        }
        inputs = model.example_inputs if example_inputs is None else _mapping(example_inputs)
        return CapturedForms(model, folder), description, inputs
    path = Path(model)
    if path.is_dir() and (path / "model.split.json").is_file():
        raise InputError(f"{path} is a model in several files: measure one of them, such as {next(path.glob('*.onnx'), path)}")
    if path.is_dir() and (path / "model.onnx").is_file():
        path = path / "model.onnx"
    if not path.is_file() or path.suffix != ".onnx":
        raise InputError(f"there is no ONNX file {path}: give a pruned .onnx file, or a directory that mfcompile prune wrote")
    given = None if example_inputs is None else _mapping(example_inputs)
    return FileForms(path, None if given is None else given.kwargs, folder), {"name": path.name}, given


def _mapping(inputs: Any) -> ExampleInputs:
    """Example inputs of a file: a mapping of tensors by name."""
    if isinstance(inputs, ExampleInputs):
        return inputs
    try:
        found = dict(inputs)
    except (TypeError, ValueError):
        raise InputError(f"example_inputs of a file must be a mapping input -> tensor, got {type(inputs).__name__}") from None
    return ExampleInputs((), found, tuple(found))


def _made_up(source: FormSource, files: Sequence[SessionFile]) -> ExampleInputs:
    """Random inputs, made from the types of the graph's inputs."""
    from mfcompile.frontends.onnx_synthesis import synthesize
    from mfcompile.onnx_file import OnnxFile

    try:
        path = source.file("dense", "fp32")
    except InputError:
        path = files[0].path
    return synthesize(OnnxFile(path))


def _sizes(
    files: Sequence[SessionFile], examples: ExampleInputs, batch: Sequence[int], tokens: Sequence[int] | None, threads: int
) -> tuple[list[SizedInputs], list[str]]:
    """The sizes at which some form runs, and notes about those at which none does.

    Raises:
        InputError: there is none; says what the first form said.
    """
    refusals: list[str] = []
    for file in files:
        try:
            session = file.open(threads)
        except InputError as error:
            refusals.append(f"{file.name}: {error}")
            continue
        shapes = declared_shapes(session)
        found, notes = sized_inputs(with_inputs_of(examples, list(shapes)), free_axes(shapes), batch, tokens)
        running = []
        for sized in found:
            try:
                feeds, _ = make_feeds(session, sized.inputs)
                session.run_with_ort_values([node.name for node in session.get_outputs()], feeds)
            except Exception as error:
                refusals.append(f"{sized.size.label}: {first_line(error)}")
                notes.append(f"the model does not run at {sized.size.label}, which was left out: {first_line(error)}")
            else:
                running.append(sized)
        if running:
            return running, notes
    raise InputError(f"no form of the model runs at any size. {'; '.join(refusals[:3])}")


def _check_counts(threads: Sequence[int] | None, rounds: int | None) -> tuple[int, ...]:
    """Numbers of threads, each once.

    Raises:
        InputError: a number under 1.
    """
    if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise InputError(f"rounds must be a whole number from 1, got {rounds!r}")
    if threads is None:
        threads = (1, min(usable_cores(), MOST_DEFAULT_THREADS))
    if not threads or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in threads):
        raise InputError(f"threads must be whole numbers from 1, got {', '.join(map(str, threads)) or 'none'}")
    return tuple(dict.fromkeys(threads))


def _silent(stage: str, done: int, total: int | None) -> None:
    """Report nothing."""
