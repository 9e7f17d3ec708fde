"""Reports as tables for people. Every number comes from the report; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

REGION_STYLES = {"vision": "blue", "text": "yellow", "fusion": "green"}

MOST_REASONS = 8
"""Further reasons for skipping are summed up in one row."""

EXAMPLES_PER_REASON = 2


FILES = {
    "model.onnx": "the pruned model, for stock onnxruntime",
    "model.onnx.data": "its weights",
    "model.split.json": "how the parts chain: inputs, outputs, sizes, hashes",
    "model.safetensors": "the pruned weights under their own names, zeros included",
    "model.pt2": "the pruned program of torch.export, zeros included",
    "config.json": "the configuration, for its own library",
    "masks.safetensors": "one bit per prunable weight, 1 = kept; new values, where kept weights were rewritten",
    "statistics.safetensors": "what calibration saw; --statistics prunes from it again",
    "recipe.yaml": "every option, and the digest of the masks; prune it to repeat this run",
    "report.json": "everything above, and every site",
    "sparsity.png": "sparsity per layer and region",
    "sparsity.svg": "the same picture, for print",
    "stages.png": "FLOPs that are left after every stage of the search, and the loss",
    "stages.svg": "the same picture, for print",
}


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    emphasis: int = 0,
    bold: Collection[int] = (),
    ends: Collection[int] = (),
) -> RenderableType:
    """A titled table; a column whose header begins with ``>`` is aligned to the right.

    Args:
        title: printed above the table.
        columns: headers.
        rows: cells; text is shown as it is, brackets included.
        emphasis: how many rows at the end are set off as totals.
        bold: further rows that stand out.
        ends: rows after which a line is drawn.
    """
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column.startswith(">")
        view.add_column(column.removeprefix(">"), justify="right" if is_number else "left", overflow="fold")
    cells = list(rows)
    for index, row in enumerate(cells):
        is_total = index >= len(cells) - emphasis or index in bold
        styled = (Text(cell, style="bold" if is_total else REGION_STYLES.get(cell, "")) for cell in row)
        view.add_row(*styled, end_section=index == len(cells) - emphasis - 1 or index in ends)
    return Group(Text(title, style="bold underline"), Padding(view, (0, 0, 1, 1), expand=False))


def inputs_table(report: Mapping[str, Any]) -> RenderableType:
    """What every input was taken for, and why."""
    rows = [
        (item["name"], _shape(item["shape"]), item["dtype"], item["modality"] or "control", item["reason"])
        for item in report["inputs"]
    ]
    return table("Inputs", ("input", "shape", "dtype", "modality", "because"), rows)


def regions_table(report: Mapping[str, Any]) -> RenderableType:
    """What was pruned, by region and in total."""
    rows = [
        (
            row["region"],
            f"{row['sites']:,}",
            f"{row['weights']:,}",
            percent(row["sparsity_requested"]),
            percent(row["sparsity"]),
            f"{row['kept']:,}",
            _range(row["tokens_min"], row["tokens_max"]),
            "-" if row["padding_tokens_max"] is None else f"{row['padding_tokens_max']:,}",
        )
        for row in report["regions"]
    ]
    prunable, everything = report["totals"]["prunable"], report["totals"]["all_parameters"]
    rows.append(
        (
            "prunable",
            f"{len(report['sites']):,}",
            f"{prunable['weights']:,}",
            percent(prunable["sparsity_requested"]),
            percent(prunable["sparsity"]),
            f"{prunable['kept']:,}",
            "",
            "",
        )
    )
    rows.append(
        (
            "all parameters",
            "",
            f"{everything['weights']:,}",
            "",
            percent(everything["sparsity"]),
            f"{everything['kept']:,}",
            "",
            "",
        )
    )
    columns = ("region", ">sites", ">weights", ">requested", ">achieved", ">kept", ">tokens seen", ">padding left out")
    return table("Sparsity by region (fraction of weights removed)", columns, rows, emphasis=2)


def sparsities_table(reports: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """One row per result: what was removed, how large the file is, and how well the model does."""
    names = list(dict.fromkeys(name for report in reports.values() for name in _pruned_metrics(report)))
    rows = []
    for place, report in reports.items():
        total, export = report["totals"]["prunable"], report["export"]
        metrics = _pruned_metrics(report)
        rows.append(
            (
                place,
                percent(total["sparsity"]),
                f"{total['kept']:,}",
                "-" if export is None else size(export["size_bytes"]),
                "-" if export is None else f"{export['size_ratio']:.2f}x",
                *(_metric(metrics.get(name)) for name in names),
            )
        )
    columns = ("result", ">sparsity", ">kept", ">ONNX", ">of dense", *(f">{name}" for name in names))
    return table("Several sparsities, one calibration", columns, rows)


def _pruned_metrics(report: Mapping[str, Any]) -> Mapping[str, float]:
    """The metrics of the pruned module; empty where nothing was evaluated."""
    found: Mapping[str, float] = ((report["evaluation"] or {}).get("metrics") or {}).get("pruned", {})
    return found


def plan_table(report: Mapping[str, Any]) -> RenderableType:
    """What would be pruned, by region."""
    rows = [
        (
            row["region"],
            f"{row['sites']:,}",
            f"{row['weights']:,}",
            percent(row["sparsity_requested"]),
            f"{row['kept']:,}",
        )
        for row in report["plan"]
    ]
    total, kept = (sum(row[key] for row in report["plan"]) for key in ("weights", "kept"))
    sites = sum(row["sites"] for row in report["plan"])
    rows.append(("prunable", f"{sites:,}", f"{total:,}", percent((total - kept) / total if total else 0.0), f"{kept:,}"))
    columns = ("region", ">sites", ">weights", ">to remove", ">to keep")
    return table("Plan by region", columns, rows, emphasis=1)


def skipped_table(report: Mapping[str, Any]) -> RenderableType | None:
    """The linear weights that stay dense, by reason; None where there are none."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for site in report["skipped"]:
        grouped.setdefault(site["reason"], []).append(site)
    if not grouped:
        return None
    ordered = sorted(grouped.items(), key=lambda item: -len(item[1]))
    rows = [(reason, *_counts(sites), _some(sites)) for reason, sites in ordered[:MOST_REASONS]]
    rest = [site for _, sites in ordered[MOST_REASONS:] for site in sites]
    if rest:
        rows.append((f"{len(ordered) - MOST_REASONS} further reasons (see report.json)", *_counts(rest), _some(rest)))
    title = f"Left dense: {len(report['skipped']):,} linear weights"
    return table(title, ("because", ">weights", ">elements", "for example"), rows)


def note_lines(diagnostics: Sequence[Mapping[str, str]]) -> list[str]:
    """What was decided by a weaker rule or left alone: one line a reason, with the first weights that it is said of."""
    subjects: dict[str, list[str]] = {}
    for item in diagnostics:
        subjects.setdefault(item["reason"], []).append(item["subject"])
    return [f"note: {_first(names)}: {reason}" for reason, names in subjects.items()]


def _first(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - EXAMPLES_PER_REASON
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:EXAMPLES_PER_REASON])} and {more:,} more"


def parity_table(parity: Mapping[str, Any]) -> RenderableType:
    """Agreement of onnxruntime and the reference, output by output; with the sparse kernels too where these were compared."""
    sparse = parity.get("sparse") or {"outputs": []}
    differences = {item["name"]: item for item in sparse["outputs"]}
    rows = [
        (
            item["name"],
            _scientific(item["max_abs_diff"]),
            *([_scientific(differences[item["name"]]["max_abs_diff"])] if differences else []),
            _scientific(item["max_abs"]),
            "within" if item["within"] and differences.get(item["name"], item)["within"] else "OUTSIDE",
        )
        for item in parity["outputs"]
    ]
    reference = parity.get("reference", "PyTorch")
    title = f"Parity of {parity['runtime']} with {reference} (atol {parity['atol']:g}, rtol {parity['rtol']:g})"
    with_kernels = [">with mfcompile.runtime"] if differences else []
    return table(title, ("output", ">largest difference", *with_kernels, ">largest value", "tolerance"), rows)


def parts_table(export: Mapping[str, Any], latency: Mapping[str, Any] | None = None) -> RenderableType:
    """The files of a split model: what each reads and gives, how large it is, how long it takes."""
    times, sparse = ((latency or {}).get(key, {}) for key in ("parts_ms", "sparse_parts_ms"))
    rows = [
        (
            item["file"],
            size(item["size_bytes"]),
            size(item["dense_size_bytes"]),
            milliseconds(times[item["name"]]) if item["name"] in times else "-",
            *([milliseconds(sparse[item["name"]])] if sparse else []),
            ", ".join(item["input_names"]),
            ", ".join(item["output_names"]),
        )
        for item in export["parts"]
    ]
    with_kernels = [">with mfcompile.runtime"] if sparse else []
    columns = ("part", ">size", ">dense", ">latency", *with_kernels, "reads", "gives")
    return table("Parts, in running order", columns, rows)


def evaluation_table(evaluation: Mapping[str, Mapping[str, float | None]]) -> RenderableType:
    """The user's own metrics, before and after."""
    variants = list(evaluation)
    metrics = list(dict.fromkeys(name for row in evaluation.values() for name in row))
    rows = [(metric, *(_metric(evaluation[variant].get(metric)) for variant in variants)) for metric in metrics]
    return table("Evaluation (by the model's own evaluate)", ("metric", *(f">{name}" for name in variants)), rows)


def files_table(report: Mapping[str, Any], directory: Path) -> RenderableType:
    """What was written, and where."""
    parts = {
        item["file"]: f"the {item['name']} part, for stock onnxruntime" for item in (report["export"] or {}).get("parts", ())
    }
    rows = [(name, size(count), parts.get(name, FILES.get(name, ""))) for name, count in report["files"].items()]
    own = directory / "report.json"  # it cannot hold its own size
    rows.append((own.name, size(own.stat().st_size), FILES[own.name]))
    return table(f"Written to {directory}", ("file", ">size", "what it is"), sorted(rows))


def evidence_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Every linear weight with the dataflow that decided its region."""
    cells = [
        (
            row["name"],
            row["region"],
            _shape(row["shape"]),
            " + ".join(row["label"]) or "nothing",
            f"{row['block']} ({' + '.join(row['block_label']) or 'nothing'})" if row["block"] else "-",
            "yes" if row["reason"] is None else "no",
        )
        for row in rows
    ]
    columns = ("weight", "region", "out x in", "reached by", "block (and what leaves it)", "pruned?")
    return table("Linear weights", columns, cells)


def attempts_table(report: Mapping[str, Any]) -> RenderableType:
    """Every way of capturing that was tried."""
    rows = [
        (
            item["frontend"],
            "worked" if item["succeeded"] else "failed",
            f"{item['seconds']:.1f} s",
            " ".join(item["detail"].split())[:300],
        )
        for item in report["capture"]["attempts"]
    ]
    return table("Capture", ("front end", "result", ">time", "detail"), rows)


def percent(value: float | None) -> str:
    """A fraction as people read it."""
    return "-" if value is None else f"{100 * value:.2f} %"


def size(count: float) -> str:
    """Bytes in a unit that leaves three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count:.0f} bytes"


def milliseconds(value: float) -> str:
    """Milliseconds with three digits, or all before the point."""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(length) for length in shape) or "scalar"


def _range(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return "-"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _counts(sites: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return f"{len(sites):,}", f"{sum(site['weights'] for site in sites):,}"


def _some(sites: Sequence[Mapping[str, Any]]) -> str:
    return _first([site["name"] for site in sites])


def _scientific(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
