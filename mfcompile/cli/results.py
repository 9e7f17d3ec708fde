"""What ``mfcompile prune`` prints at the end."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfcompile.cli import tables
from mfcompile.cli.console import Terminal
from mfcompile.cli.method_options import modes_table, structure_lines
from mfcompile.cli.tables import milliseconds
from mfcompile.cli.token_options import cuts_table


def show(report: Mapping[str, Any], directory: Path, source: Path, terminal: Terminal) -> None:
    """The report as tables and plain sentences, what was written where, and what to do next."""
    out = terminal.out
    out.print(tables.inputs_table(report))
    out.print(tables.regions_table(report))
    if report.get("structure"):
        out.print(modes_table(report["structure"]))
        for line in structure_lines(report["structure"]):
            terminal.say(line)
    if report.get("tokens"):
        out.print(cuts_table(report["tokens"]))
    if report["calibration"] is not None:
        terminal.say(f"{calibration_line(report['calibration'])}\n")
    skipped = tables.skipped_table(report)
    if skipped is not None:
        out.print(skipped)
    for line in tables.note_lines(report["diagnostics"]):
        terminal.say(line)
    if report["export"] is not None:
        is_masked = (
            not report.get("structure") or report["totals"]["prunable"]["kept"] < report["totals"]["prunable"]["weights"]
        )
        lines = size_lines(report["export"], report.get("structure"), is_masked=is_masked)
        for line in (*lines, *(sparse_lines(report["export"]) if is_masked else ())):
            terminal.say(line)
        if report["export"].get("parts"):
            out.print()
            out.print(tables.parts_table(report["export"], report["latency"]))
    if report["latency"] is not None:
        for line in latency_lines(report["latency"], fewer=_fewer(report)):
            terminal.say(line)
        out.print()
    if report["parity"] is not None:
        out.print(tables.parity_table(report["parity"]))
    if report["evaluation"] is not None:
        out.print(tables.evaluation_table(report["evaluation"]["metrics"]))
        for note in report["evaluation"]["notes"]:
            terminal.say(f"note: {note}")
    out.print(tables.files_table(report, directory))
    for line in next_steps(report, directory, source):
        terminal.say(line)


def show_sparsities(reports: Mapping[str, Mapping[str, Any]], terminal: Terminal) -> None:
    """Several sparsities side by side."""
    terminal.out.print(tables.sparsities_table(reports))


def calibration_line(calibration: Mapping[str, Any]) -> str:
    """What the statistics were collected from."""
    padding = ", ".join(calibration["padding_masks"]) or "none found"
    weighed = " Tokens are weighed by importance." if calibration["weighting"] != "none" else ""
    return f"Calibrated with {calibration['source']} ({calibration['batches']:,} in all); padding mask: {padding}.{weighed}"


def size_lines(export: Mapping[str, Any], structure: Mapping[str, Any] | None = None, *, is_masked: bool = True) -> list[str]:
    """How large the ONNX file is, against dense fp32 and, where units were taken out, against the whole model.

    Args:
        export: of a report.
        structure: of a report; None where nothing was taken out.
        is_masked: whether there are zeros that a format could leave out.
    """
    lines = []
    dense = "dense file's"
    if structure:
        whole, dense = 4 * structure["parameters"]["dense"], "dense file of what is left, which is"
        lines.append(
            f"Size: {_subject(export)} {tables.size(export['size_bytes'])}, {export['size_bytes'] / whole:.2f}x of the "
            f"{tables.size(whole)} that the parameters of the whole model take in fp32."
        )
        if not is_masked:
            return [*lines, *_load_lines(export)]
    lines += [
        f"Size: {_subject(export)} {tables.size(export['size_bytes'])}, {export['size_ratio']:.2f}x of the {dense} "
        f"{tables.size(export['dense_size_bytes'])}; its pruned weights take {export['pruned_ratio']:.3f}x of "
        f"their dense fp32 bytes ({export['format']}, {export['values']})."
    ]
    if export["format"] == "dense":
        lines.append("Size: the dense format stores every zero. Use --format packed for a smaller file.")
    return [*lines, *_load_lines(export)]


def _load_lines(export: Mapping[str, Any]) -> list[str]:
    """What loading takes, where a report has it (those of earlier versions do not), and notes."""
    predicted = [load_line(export)] if export.get("load_peak_bytes") else []
    return [*predicted, *(f"note: {note}" for note in export["notes"])]


def load_line(export: Mapping[str, Any]) -> str:
    """What loading takes, as predicted."""
    said = (
        f"Load, predicted: stock onnxruntime takes {tables.size(export['load_peak_bytes'])} of memory to create a session, "
        f"{export['load_peak_bytes'] / max(export['dense_size_bytes'], 1):.1f}x of the dense file"
    )
    if export["format"] != "packed":
        return f"{said}."
    return (
        f"{said}, and {export.get('load_time_ratio', 1):.1f}x of its time; mfcompile.load_session takes about the dense file's "
        f"memory, and --load-budget stores what needs less."
    )


def _subject(export: Mapping[str, Any]) -> str:
    if not export.get("parts"):
        return f"{export['file']} takes"
    return f"the {len(export['parts'])} parts together take"


def _fewer(report: Mapping[str, Any]) -> str:
    """What the model has less of, besides weights that are zero."""
    modes = (report.get("structure") or {}).get("modes", ())
    units = any(unit["removed"] for row in modes for unit in row.get("units", ()))
    return " and ".join(name for name, is_less in (("units", units), ("tokens", report.get("tokens"))) if is_less)


def latency_lines(latency: Mapping[str, Any], *, fewer: str = "") -> list[str]:
    """What was measured, and what zeros, fewer units and fewer tokens do for speed."""
    medians, load = latency["medians_ms"], latency["load_ms"]
    gain = "pruning gives no speed there, it makes the file smaller"
    gain = f"what is faster there is faster by having fewer {fewer}" if fewer else gain
    batch = "" if latency["batch_size"] is None else f", batch {latency['batch_size']}"
    lines = [
        f"Latency, measured here and now ({latency['runtime']}{batch}, {latency['repeats']} turns): dense "
        f"{milliseconds(medians['dense'])}, pruned {milliseconds(medians['pruned'])}, "
        f"pruned / dense = {latency['ratio']:.2f}.",
        f"  Stock onnxruntime multiplies zeros like any other number: {gain}.",
    ]
    if "sparse" in medians:
        lines.append(
            f"  With the library of mfcompile.runtime, which skips them: {milliseconds(medians['sparse'])}, "
            f"{_speed(latency['sparse_ratio'])}."
        )
    elif latency.get("sparse_missing"):
        lines.append(f"  Not measured with mfcompile.runtime, which skips zeros: {latency['sparse_missing']}")
    with_runtime = f", {milliseconds(load['sparse'])} with mfcompile.runtime (these are not)" if "sparse" in load else ""
    lines.append(
        f"  Loading takes {milliseconds(load['dense'])} dense and {milliseconds(load['pruned'])} pruned (packed weights are "
        f"decoded once, when the session is created){with_runtime}."
    )
    return lines


def _speed(ratio: float) -> str:
    """In words, from seconds / seconds of the dense model; differences of 5 % are left to the noise of the machine."""
    if 0.95 <= ratio <= 1.05:
        return "as fast as dense"
    return f"{1 / ratio:.2f}x as fast as dense" if ratio < 1 else f"slower than dense ({ratio:.2f} of its time)"


def sparse_lines(export: Mapping[str, Any]) -> list[str]:
    """Which pruned weights are multiplied without their zeros where the runtime is, and why others are not."""
    sparse, dense = export.get("sparse_layers", []), export.get("dense_layers", {})
    if not sparse and not dense:
        return []
    lines = [
        f"Sparse: {len(sparse):,} of {len(sparse) + len(dense):,} pruned weights are computed without their zeros where the "
        f"library of mfcompile.runtime is registered; everywhere else, and all others, as dense ones."
    ]
    reasons: dict[str, list[str]] = {}
    for fqn, reason in dense.items():
        reasons.setdefault(reason, []).append(fqn)
    for reason, names in reasons.items():
        shown = ", ".join(names[:2]) + (f" and {len(names) - 2:,} more" if len(names) > 2 else "")
        lines.append(f"  dense: {shown}: {reason}")
    return lines


def next_steps(report: Mapping[str, Any], directory: Path, source: Path) -> list[str]:
    """Commands that make sense now."""
    lines = ["Next:"]
    if report["export"] is not None:
        split = bool(report["export"].get("parts"))
        written = directory if split else directory / report["export"]["file"]
        lines.append(f"  mfcompile.load_session('{written}')      run it, with the sparse kernels where they are available")
        masks = directory / "masks.safetensors"
        if not split:
            lines.append(f"  {shlex.join(['mfcompile', 'bench', str(written)])}      measure all its forms on this machine")
        lines.append(f"  {shlex.join(['mfcompile', 'verify', str(written), str(source), '--masks', str(masks)])}")
    again = shlex.join(["mfcompile", "prune", str(directory / "recipe.yaml")])
    lines.append(f"  {again} -o DIR      run it again; the masks must be the same")
    return lines
