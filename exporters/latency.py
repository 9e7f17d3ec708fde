"""How long artefacts take, compared in one process on the same inputs, one run of each in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcompile.errors import InputError
from mfcompile.exporters.session import make_feeds, open_session
from mfcompile.exporters.split_manifest import Part
from mfcompile.exporters.split_session import SplitSession, load_parts
from mfcompile.inputs import ExampleInputs


@dataclass(frozen=True)
class LatencyComparison:
    """Seconds of every run, in turn: run i of one artefact was next to run i of the others.

    Attributes:
        seconds: name -> one entry per repeat.
    """

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of one artefact."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Median over the repeats of this artefact's seconds divided by the baseline's; below 1 is faster.

        Paired, so that a machine that is busy for a while slows both sides of a pair.
        """
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return statistics.median(own / other for own, other in pairs)


def compare_latency(
    paths: Mapping[str, Path | str],
    inputs: ExampleInputs,
    *,
    repeats: int,
    warmup: int,
    threads: int | None = None,
    libraries: Mapping[str, str] | None = None,
) -> LatencyComparison:
    """Run every artefact in turn (a b c, c b a, a b c, ...) and keep the seconds of each run.

    Args:
        paths: name -> .onnx file, or manifest of a split model.
        inputs: what to run them on.
        repeats: measured runs of each.
        warmup: runs of each before that, not kept.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        libraries: name -> library of custom operators that this artefact is run with; others run in stock onnxruntime.

    Raises:
        InputError: no paths, repeats under 1, a file that cannot be loaded, or inputs that do not fit it.
    """
    if not paths or repeats < 1 or warmup < 0:
        raise InputError(f"nothing to measure: {len(paths)} artefacts, repeats={repeats}, warmup={warmup}")
    runs = []
    for name, path in paths.items():
        session = open_session(path, threads, (libraries or {}).get(name))
        feeds, _ = make_feeds(session, inputs)
        runs.append((name, session, feeds, [node.name for node in session.get_outputs()]))
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(-warmup, repeats):
        for name, session, feeds, outputs in runs if turn % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            session.run_with_ort_values(outputs, feeds)
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
    return LatencyComparison({name: tuple(times) for name, times in seconds.items()})


def part_latency(
    path: Path | str,
    inputs: ExampleInputs,
    *,
    repeats: int,
    warmup: int = 1,
    threads: int | None = None,
    libraries: Mapping[str, str | None] | None = None,
) -> dict[str, dict[str, float]]:
    """Median seconds of every part of a split model, each fed with what the parts before it give.

    Args:
        path: the directory of the model, or its manifest.
        inputs: inputs of the whole model.
        repeats: measured runs of each part; the parts are run one after the other, as they are used.
        warmup: runs before that, not kept.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        libraries: name of a way to run the model -> library of custom operators that it is run with, None for stock
            onnxruntime; the ways take turns. Without, there is one, "stock".

    Returns:
        Way -> part -> seconds.

    Raises:
        InputError: repeats under 1, a model that cannot be loaded, or inputs that do not fit it.
    """
    if repeats < 1 or warmup < 0:
        raise InputError(f"nothing to measure: repeats={repeats}, warmup={warmup}")
    ways = libraries or {"stock": None}
    models = {way: load_parts(path, threads=threads, library=library) for way, library in ways.items()}
    values = {way: make_feeds(model, inputs)[0] for way, model in models.items()}
    seconds: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    for turn in range(-warmup, repeats):
        for way, model in models.items() if turn % 2 == 0 else reversed(models.items()):
            for part in model.manifest.parts:
                elapsed = _run_part(model, part, values[way])
                if turn >= 0:
                    seconds[way].setdefault(part.name, []).append(elapsed)
    return {way: {name: statistics.median(times) for name, times in parts.items()} for way, parts in seconds.items()}


def _run_part(model: SplitSession, part: Part, values: dict[str, Any]) -> float:
    """Seconds of one run of a part; its outputs are put with the values."""
    names = [item.name for item in part.outputs]
    feeds = {item.name: values[item.name] for item in part.inputs}
    start = time.perf_counter()
    found = model.parts[part.name].run_with_ort_values(names, feeds)
    elapsed = time.perf_counter() - start
    values.update(zip(names, found, strict=True))
    return elapsed
