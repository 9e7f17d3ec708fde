"""Pruned transformers end to end: dense onnxruntime against the sparse runtime, with masks that MULTIFLOW chose.

python -m benchmarks.sparse_models [--layers 6] [--rounds 9] [--only BERT-like] [--pattern 16x1] [--sparsity 0.75] ...
python -m benchmarks.sparse_models --memory [--only BERT-like] [--sparsity 0.75]

A ViT-B-like encoder (197 tokens) and a BERT-like one (any number), built from the configurations of transformers with random
weights: every matrix is a product of two normal draws, heavy-tailed as trained weights are, times a scale of its own between
0.01 and 0.04, so that MULTIFLOW gives every layer a sparsity of its own. Speed does not depend on values, but on how many
weights each layer keeps and where. Masks are chosen by mfcompile at 63, 75 and 90 %, unstructured and in blocks.

Forms take turns in one process; the figure is the median of the ratios of a round, with quartiles. One thread is measured in
CPU time, several on the clock. ``limit`` is Amdahl's: the whole run divided by what would be left if pruned layers took time in
proportion to the weights that they keep, and nothing else became faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import mfcompile
from benchmarks import sparse_kernels
from benchmarks.profile_nodes import node_times
from benchmarks.result_tables import as_table
from benchmarks.sparse_goals import MANY_TOKENS, joined, judge
from benchmarks.sparse_subjects import PATTERNS, SPARSITIES, SUBJECTS, WIDTH, Pruner, Subject, bert, vit
from mfcompile import runtime
from mfcompile.artifact import ExportedArtifact
from mfcompile.benchmark.cost import measure_cost
from mfcompile.benchmark.machine import describe_machine
from mfcompile.benchmark.result import SessionCost, Timing
from mfcompile.benchmark.sizes import FreeAxes, SizedInputs, declared_shapes, free_axes, sized_inputs
from mfcompile.benchmark.timing import Clock, SessionFile, measure
from mfcompile.benchmark.variants import size_of
from mfcompile.inputs import ExampleInputs
from mfcompile.masks import MaskSet

RESULT = Path(__file__).resolve().parent / "results" / "sparse.json"
LAYERS, DECODE_LAYERS = 6, 12
MOST_ERROR = 1e-3
"""Of outputs, against dense onnxruntime; kernels that compute something else are not timed."""


def _tell(text: str) -> None:
    """Progress on stderr: a run takes long."""
    Console(stderr=True).log(text, highlight=False)


def measure_subject(
    subject: Subject,
    folder: Path,
    rounds: int,
    library: str,
    sparsities: Sequence[float],
    found: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Add rows of speed, files, memory, and where the time goes, of one model with every mask.

    Args:
        subject: the model.
        folder: where its files are written.
        rounds: how often every form has its turn.
        library: the sparse runtime.
        sparsities: of the masks.
        found: lists of rows by part, which are added to.
        keep: called after every mask.
    """
    pruner = Pruner.of(subject)
    dense = SessionFile("dense", pruner.export(folder / "unpruned.onnx", None, format="dense").path)
    examples = ExampleInputs((), subject.examples, tuple(subject.examples))
    axes = free_axes(declared_shapes(dense.open(1)))
    usual = node_times(dense, examples)
    found["operators"].append({"model": subject.name, "form": "dense", **_shares(usual)})
    unpruned = _dense_cost(pruner, folder, examples)
    for pattern in subject.patterns:
        for sparsity in sparsities:
            _tell(f"{subject.name}, {pattern}, {sparsity:.0%}")
            masks = pruner.masks(sparsity, pattern)
            artifact = pruner.export(folder / "packed.onnx", masks, format="packed", external_data=False)
            packed = SessionFile("runtime", artifact.path, library)
            dense = SessionFile("dense", mfcompile.unpack(artifact.path, folder / "dense.onnx", overwrite=True)[0])
            head = {"model": subject.name, "pattern": pattern, "sparsity": sparsity}
            timed = _speed(subject, pattern, (dense, packed), examples, axes, rounds, usual, masks)
            found["speed"] += [{**head, **row} for row in timed]
            found["files"].append({**head, **_file_figures(artifact)})
            if pattern == "unstructured":
                found["memory"] += [{**head, **row} for row in _memory(pruner, masks, packed, examples, unpruned)]
            found["operators"].append({**head, "form": "runtime", **_shares(node_times(packed, examples))})
            keep()


def _speed(
    subject: Subject,
    pattern: str,
    forms: tuple[SessionFile, SessionFile],
    examples: ExampleInputs,
    axes: FreeAxes,
    rounds: int,
    usual: Mapping[str, float],
    masks: MaskSet,
) -> list[dict[str, Any]]:
    """Rows of every size with one thread; with unstructured masks larger batches and two threads as well."""
    is_usual = pattern == "unstructured"
    sizes: list[SizedInputs] = []
    for batch, tokens in subject.sizes if is_usual else [size for size in subject.sizes if size[0] == 1]:
        sizes += sized_inputs(examples, axes, (batch,), () if tokens is None else (tokens,))[0]
    rows = []
    many = next(sized for sized in sizes if _rows(sized) >= MANY_TOKENS)
    for threads, chosen in ((1, sizes), (2, [many] if is_usual else [])):
        found = measure(forms, chosen, baseline="dense", threads=threads, rounds=rounds, clock=Clock())
        wrong = [item for item in found.timings if (item.max_error or 0) > MOST_ERROR]
        if found.failures or wrong:
            raise SystemExit(f"{subject.name}: {found.failures or wrong}")
        timings = {(item.variant, item.size): item for item in found.timings}
        for index, sized in enumerate(chosen):
            own, other = timings["runtime", index], timings["dense", index]
            rows.append({"size": sized.size.label, "tokens": _rows(sized), "threads": threads, **_ratio(own, other)})
    density, share = masks.kept_count / masks.weight_count, usual["linear"] / sum(usual.values())
    for row in rows:
        row["limit"] = round(1 / (1 - share + share * density), 2)
    return rows


def _rows(sized: SizedInputs) -> int:
    """Rows that a linear layer multiplies: those of all samples; an image of 224 pixels makes 197."""
    return (sized.size.batch or 1) * (sized.size.tokens or MANY_TOKENS)


def _ratio(own: Timing, dense: Timing) -> dict[str, Any]:
    assert own.speedup is not None
    assert own.speedup_low is not None
    assert own.speedup_high is not None
    return {
        "dense_ms": round(1e3 * dense.seconds, 2), "runtime_ms": round(1e3 * own.seconds, 2),
        "speedup": round(own.speedup, 3), "low": round(own.speedup_low, 3), "high": round(own.speedup_high, 3),
    }  # fmt: skip


def _shares(times: Mapping[str, float]) -> dict[str, Any]:
    """Milliseconds of one run by kind of operator, and the share of linear layers."""
    total = sum(times.values())
    listed = {name: round(1e3 * seconds, 3) for name, seconds in sorted(times.items(), key=lambda item: -item[1])}
    return {"run_ms": round(1e3 * total, 2), "linear_share": round(times["linear"] / total, 3), "operators_ms": listed}


def _file_figures(artifact: ExportedArtifact) -> dict[str, Any]:
    """Bytes of file and pruned weights, and what these take at 4 bytes per kept weight and one bit per place."""
    stored = sum(item.stored_bytes for item in artifact.encodings)
    ideal = sum(4 * item.kept_count + item.weight_count / 8 for item in artifact.encodings)
    return {
        "file_mb": round(artifact.size_bytes / 1e6, 2), "dense_mb": round(artifact.dense_size_bytes / 1e6, 2),
        "pruned_mb": round(stored / 1e6, 2), "ideal_mb": round(ideal / 1e6, 2), "over_ideal": round(stored / ideal, 3),
        "encodings": _counts([item.encoding for item in artifact.encodings]),
    }  # fmt: skip


def _counts(words: Sequence[str]) -> dict[str, int]:
    return {word: words.count(word) for word in sorted(set(words))}


@dataclass(frozen=True)
class _DenseCost:
    """What the dense file takes in stock onnxruntime.

    Attributes:
        places: where the tensors lie -> memory and time.
        activations: bytes that runs add where tensors are external data. Free memory that creating the session left behind
            would hide them, and is given back before.
    """

    places: Mapping[str, SessionCost]
    activations: int


def _dense_cost(pruner: Pruner, folder: Path, examples: ExampleInputs) -> _DenseCost:
    inside, outside = (
        SessionFile("dense", pruner.export(folder / f"{name}.onnx", None, format="dense", external_data=name == "mapped").path)
        for name in ("unpruned", "mapped")
    )
    costs = {"inside": measure_cost(inside, examples, threads=1), "external data": measure_cost(outside, examples, threads=1)}
    activations = measure_cost(outside, examples, threads=1, is_trimmed=True).run_bytes
    assert activations is not None
    return _DenseCost(costs, activations)


def _memory(
    pruner: Pruner, masks: MaskSet, packed: SessionFile, examples: ExampleInputs, dense: _DenseCost
) -> list[dict[str, Any]]:
    """Memory and loading with the packed weights inside of the .onnx file, and in a file of external data beside it.

    Packed files are loaded by ``mfcompile.load_session``. What runs add to their own sessions is kept beside what they add to
    the dense one: less, because they are loaded without memory patterns.
    """
    outside = pruner.export(packed.path.with_name("external.onnx"), masks, format="packed", external_data=True).path
    rows = []
    for place, path in (("inside", packed.path), ("external data", outside)):
        own, usual = measure_cost(SessionFile("runtime", path, packed.library), examples, threads=1), dense.places[place]
        size = size_of(path)
        assert own.resident_bytes is not None
        assert own.run_bytes is not None
        assert usual.resident_bytes is not None
        rows.append(
            {"weights": place, "file_mb": round(size / 1e6, 1), "resident_mb": round(own.resident_bytes / 1e6, 1),
             "dense_resident_mb": round(usual.resident_bytes / 1e6, 1),
             "activations_mb": round(dense.activations / 1e6, 1), "own_activations_mb": round(own.run_bytes / 1e6, 1),
             "over_file": round((own.resident_bytes - dense.activations) / size, 3),
             "over_file_own": round((own.resident_bytes - own.run_bytes) / size, 3),
             "peak_mb": round((own.peak_bytes or 0) / 1e6, 1),
             "load_ms": round(1e3 * own.creation_seconds, 1), "dense_load_ms": round(1e3 * usual.creation_seconds, 1),
             "first_run_ms": round(1e3 * own.first_run_seconds, 1),
             "dense_first_run_ms": round(1e3 * usual.first_run_seconds, 1)}
        )  # fmt: skip
    return rows


def measure_memory(subject: Subject, folder: Path, library: str, sparsities: Sequence[float]) -> Iterator[list[dict[str, Any]]]:
    """Rows of memory of one model, sparsity by sparsity, with unstructured masks."""
    pruner = Pruner.of(subject)
    examples = ExampleInputs((), subject.examples, tuple(subject.examples))
    dense = _dense_cost(pruner, folder, examples)
    for sparsity in sparsities:
        _tell(f"memory, {subject.name}, {sparsity:.0%}")
        masks = pruner.masks(sparsity, "unstructured")
        packed = pruner.export(folder / "packed.onnx", masks, format="packed", external_data=False)
        head = {"model": subject.name, "pattern": "unstructured", "sparsity": sparsity}
        measured = _memory(pruner, masks, SessionFile("runtime", packed.path, library), examples, dense)
        yield [{**head, **row} for row in measured]


def measure_decode(rounds: int, library: str) -> list[dict[str, Any]]:
    """One token through the pruned feed-forward layers of the BERT-like model in turn: weights come from memory."""
    subject = bert(DECODE_LAYERS)
    pruner, rows = Pruner.of(subject, is_exported=False), []
    state = dict(subject.module.named_parameters())
    for pattern in ("unstructured", "16x1"):
        for sparsity in SPARSITIES:
            masks = pruner.masks(sparsity, pattern)
            names = [name for name in masks if set(masks.packed[name].shape) == {WIDTH, 4 * WIDTH}]
            weights = [(state[name].detach() * masks[name]).numpy() for name in names]
            density = sum(np.count_nonzero(weight) for weight in weights) / sum(weight.size for weight in weights)
            sessions = tuple(
                sparse_kernels.open_session(sparse_kernels.make_model(weights, is_sparse), library if is_sparse else None)
                for is_sparse in (False, True)
            )
            x = np.random.default_rng(0).standard_normal((1, weights[0].shape[1])).astype(np.float32)
            found = sparse_kernels.compare(sessions[0], sessions[1], x, 3 * rounds)
            rows.append(
                {"pattern": pattern, "sparsity": sparsity, "dense_mb": round(sum(weight.nbytes for weight in weights) / 1e6, 1),
                 "achieved": round(1 - density, 4), "limit": round(4 / (4 * density + 1 / 8), 2), "speedup": found["ratio"],
                 "low": found["ratio_low"], "high": found["ratio_high"], "dense_us": found["dense_us"],
                 "runtime_us": found["sparse_us"]}
            )  # fmt: skip
    return rows


def measure_int8(layers: int, rounds: int, library: str, sparsities: Sequence[float]) -> list[dict[str, Any]]:
    """The ViT-B-like model in int8: dense in stock onnxruntime, and sparse, with masks in blocks of four inputs and without."""
    subject = vit(layers)
    pruner, rows = Pruner.of(subject), []
    examples = ExampleInputs((), subject.examples, tuple(subject.examples))
    with tempfile.TemporaryDirectory(prefix="mfcompile-") as name:
        folder = Path(name)
        for pattern, sparsity in [("1x4", sparsity) for sparsity in sparsities] + [("unstructured", sparsities[-1])]:
            _tell(f"int8, {pattern}, {sparsity:.0%}")
            masks = pruner.masks(sparsity, pattern)
            forms = [
                SessionFile("int8", pruner.export(folder / "int8.onnx", masks, format="dense", values="int8").path),
                SessionFile("dense", pruner.export(folder / "dense.onnx", masks, format="dense").path),
                SessionFile("sparse", pruner.export(folder / "sparse.onnx", masks, values="int8").path, library),
            ]
            sizes = sized_inputs(examples, free_axes(declared_shapes(forms[0].open(1))), (1,), ())[0]
            found = measure(forms, sizes, baseline="int8", threads=1, rounds=rounds, clock=Clock())
            if found.failures:
                raise SystemExit(f"int8: {found.failures}")
            timings = {item.variant: item for item in found.timings}
            ratio = {name: timings[name].speedup or 0.0 for name in ("dense", "sparse")}
            error = measure(forms[1::-1], sizes, baseline="dense", threads=1, rounds=1, clock=Clock()).timings[1].max_error
            rows.append(
                {"model": subject.name, "pattern": pattern, "sparsity": sparsity, "size": sizes[0].size.label,
                 "ms": {name: round(1e3 * timing.seconds, 2) for name, timing in timings.items()},
                 "int8": round(1 / ratio["dense"], 3), "int8_runtime": round(ratio["sparse"] / ratio["dense"], 3),
                 "over_int8": round(ratio["sparse"], 3), "low": round(timings["sparse"].speedup_low or 0.0, 3),
                 "high": round(timings["sparse"].speedup_high or 0.0, 3), "int8_error": error,
                 "kernel_error": timings["sparse"].max_error,
                 "file_mb": {file.name: round(size_of(file.path) / 1e6, 2) for file in forms}}
            )  # fmt: skip
    return rows


def sparse_models(
    layers: int = LAYERS,
    rounds: int = 9,
    only: Sequence[str] = (),
    patterns: Sequence[str] = PATTERNS,
    sparsities: Sequence[float] = SPARSITIES,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Everything, as it is kept in JSON; ``keep`` is called with what there is so far."""
    library = runtime.library_path()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": describe_machine(runtime.instruction_set()),
        "options": {"layers": layers, "rounds": rounds, "width": WIDTH},
        "speed": [], "files": [], "memory": [], "operators": [],
    }  # fmt: skip
    for name, build in SUBJECTS.items():
        if not only or name in only:
            with tempfile.TemporaryDirectory(prefix="mfcompile-") as folder:
                subject = build(layers)
                subject = replace(subject, patterns=tuple(name for name in subject.patterns if name in patterns))
                measure_subject(subject, Path(folder), rounds, library, sparsities, result, lambda: keep(result))
    if not only or "decode" in only:
        result["decode"] = measure_decode(rounds, library)
    if not only or "int8" in only:
        result["int8"] = measure_int8(layers, rounds, library, sparsities)
    result["goals"] = judge(result)
    return result


def _remeasure_memory(output: Path, layers: int, names: Sequence[str], sparsities: Sequence[float]) -> None:
    """Rows of memory in place of those of an earlier result, whose other parts stay as they are."""
    before = json.loads(output.read_text())
    torch.set_num_threads(1)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="mfcompile-") as folder:
            for rows in measure_memory(SUBJECTS[name](layers), Path(folder), runtime.library_path(), sparsities):
                place = name, rows[0]["sparsity"]
                kept = [row for row in before["memory"] if (row["model"], row["sparsity"]) != place]
                before["memory"] = sorted(kept + rows, key=lambda row: (list(SUBJECTS).index(row["model"]), row["sparsity"]))
                before["goals"] = judge(before)
                output.write_text(json.dumps(before, indent=1) + "\n")
    Console(width=200).print(as_table("memory", before["memory"]))


def main() -> None:
    """Measure, print, and keep the result as JSON; parts that are not measured stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", action="append", choices=[*SUBJECTS, "decode", "int8"], default=[])
    parser.add_argument("--pattern", action="append", choices=PATTERNS, help="of the masks (default: all)")
    parser.add_argument("--sparsity", action="append", type=float, choices=SPARSITIES, help="of the masks (default: all)")
    parser.add_argument("--memory", action="store_true", help="measure memory and loading alone")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.memory:
        _remeasure_memory(options.output, options.layers, options.only or list(SUBJECTS), options.sparsity or SPARSITIES)
        return
    is_part = bool(options.only or options.pattern or options.sparsity)
    before = json.loads(options.output.read_text()) if is_part and options.output.exists() else {}
    patterns, sparsities = options.pattern or PATTERNS, options.sparsity or SPARSITIES

    def keep(result: dict[str, Any]) -> None:
        options.output.write_text(json.dumps(joined(before, result), indent=1) + "\n")

    keep(sparse_models(options.layers, options.rounds, options.only, patterns, sparsities, keep))
    for part, figures in json.loads(options.output.read_text()).items():
        Console(width=200).print(as_table(part, figures))


if __name__ == "__main__":
    main()
