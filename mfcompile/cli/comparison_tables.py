"""A comparison of pruners as tables and sentences. Every number comes from its JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from mfcompile.cli.tables import percent, table

MOST_METRICS = 3
"""Further metrics are in compare.json."""

MOST_OUTPUTS = 6
"""Further outputs are summed up."""


def results_table(document: Mapping[str, Any]) -> RenderableType:
    """The dense model, then every sparsity with its pruners, the best first and marked."""
    names = metric_names(document)[:MOST_METRICS]
    regions = list(dict.fromkeys(region for row in document["rows"] for region in row["regions"]))
    dense = document["dense"]["metrics"]
    rows: list[tuple[str, ...]] = [
        ("dense", "-", *(_figure(dense.get(name)) for name in names), "0", *("-" for _ in regions), "-", "-")
    ]
    bold, ends = set(), {0}
    for index, row in enumerate(document["rows"], start=1):
        if index > 1 and row["sparsity"] != document["rows"][index - 2]["sparsity"]:
            ends.add(index - 1)
        if row["is_best"]:
            bold.add(index)
        rows.append(
            (
                f"{row['pruner']} (best)" if row["is_best"] else row["pruner"],
                percent(row["achieved"]),
                *(_figure(row["metrics"].get(name)) for name in names),
                _error(row["output_error"]),
                *(percent(row["regions"].get(region)) for region in regions),
                f"{100 * row['least_pruned']['sparsity']:.1f} to {100 * row['most_pruned']['sparsity']:.1f} %",
                f"{row['seconds']:.1f} s",
            )
        )
    metric = document["metric"]
    shown = [f">{name} *" if metric and name == metric["name"] else f">{name}" for name in names]
    columns = ("pruner", ">sparsity", *shown, f">output error{'' if metric else ' *'}", *(f">{name}" for name in regions))
    title = "Pruners compared: sparsity by region, and from the least to the most pruned layer"
    return table(title, (*columns, ">layers", ">chosen in"), rows, bold=bold, ends=ends)


def agreement_table(matrix: Mapping[str, Any]) -> RenderableType:
    """Every pruner against every other, at one sparsity."""
    labels = matrix["pruners"]
    rows = [
        (label, *("1" if row == column else _kappa(value) for column, value in enumerate(values)))
        for row, (label, values) in enumerate(zip(labels, matrix["kappa"], strict=True))
    ]
    title = f"Agreement of masks at {_asked(matrix['sparsity'])} (Cohen's kappa: 1 the same weights, 0 what chance gives)"
    return table(title, ("", *(f">{label}" for label in labels)), rows)


def metric_names(document: Mapping[str, Any]) -> list[str]:
    """The user's metrics, the one that ranks first."""
    metric = document["metric"]
    found = list(document["dense"]["metrics"])
    return found if metric is None else [metric["name"], *(name for name in found if name != metric["name"])]


def explanation(document: Mapping[str, Any]) -> Iterator[str]:
    """What the columns mean, and what was compared on what."""
    metric, data, outputs = document["metric"], document["data"], document["outputs"]
    if metric is not None:
        way = "higher" if metric["is_higher_better"] else "lower"
        yield f"* ranks the pruners of a sparsity; {way} {metric['name']} is better ({metric['reason']})."
        yield "  --metric NAME:max or NAME:min says it otherwise."
    else:
        yield "* ranks the pruners of a sparsity: there is no evaluate. Define evaluate(model) in model.py for your own metric."
    names = [item["name"] for item in outputs]
    listed = ", ".join(names[:MOST_OUTPUTS]) + (f" and {len(names) - MOST_OUTPUTS} more" if len(names) > MOST_OUTPUTS else "")
    is_float = any(item["kind"] == "float" for item in outputs)
    what = "||pruned - dense|| / ||dense||, the mean over float outputs" if is_float else "fraction of elements that differ"
    padding = sum(item["left_out"] for item in outputs)
    without = f" without {padding:,} elements of padding or filling" if padding else ""
    yield (
        f"Output error: {what} ({listed}), over {data['compared_samples']:,} samples: {data['compared_on']}{without}."
        + (f" Calibrated with {data['samples']:,} samples." if _is_calibrated(document) else "")
    )
    if not data["is_held_out"] and any(pruner["update"] for pruner in document["pruners"]):
        yield "  Weight updates are fitted to these very samples, and look better on them: give eight batches, or --held-out N."
    emptied = [row for row in document["rows"] if row["emptied_layers"]]
    for row in emptied[:MOST_OUTPUTS]:
        count = len(row["emptied_layers"])
        layers = f"{count} layers are" if count > 1 else "a layer is"
        yield f"note: {row['pruner']} at {_asked(row['sparsity'])}: {layers} empty ({row['emptied_layers'][0]})"
    if len(emptied) > MOST_OUTPUTS:
        yield f"note: {len(emptied) - MOST_OUTPUTS} more rows have empty layers"


def next_step(document: Mapping[str, Any], source: Path, options: Sequence[str] = ()) -> str | None:
    """The command that prunes with the best pruner, at the sparsity whose agreement is shown; None where none is best.

    Args:
        document: what ``Comparison.as_dict`` returned.
        source: the model.
        options: further words of the command: what data, and which weights, were compared on.
    """
    sparsity = document["agreement"][document["middle"]]["sparsity"]
    best = next((row for row in document["rows"] if row["is_best"] and row["sparsity"] == sparsity), None)
    if best is None:
        return None
    pruner = next(item for item in document["pruners"] if item["label"] == best["pruner"])
    if pruner["is_floor"]:
        return f"At {_asked(sparsity)} nothing does better than random scores: this measure tells these pruners not apart."
    if isinstance(pruner["allocation"], Mapping):
        return f"Best at {_asked(sparsity)}: {best['pruner']}. Prune with its sparsities by layer in a file: --allocation FILE."
    words = ["mfcompile", "prune", str(source), "--criterion", pruner["criterion"]]
    if pruner["criterion_options"]:
        words += ["--criterion-option", *(f"{name}={value}" for name, value in pruner["criterion_options"].items())]
    if pruner["is_allocation_chosen"]:
        words += ["--allocation", pruner["allocation"]]
    if pruner["pattern"] != "unstructured":
        words += ["--pattern", pruner["pattern"]]
    if pruner["update"]:
        words += ["--update", pruner["update"]]
    if pruner["update_options"]:
        words += ["--update-option", *(f"{name}={value}" for name, value in pruner["update_options"].items())]
    given = (
        ",".join(f"{name}={value}" for name, value in sparsity.items()) if isinstance(sparsity, Mapping) else f"{sparsity:g}"
    )
    return f"Best at {_asked(sparsity)}: {best['pruner']}. Next:  {shlex.join([*words, '--sparsity', given, *options])}"


def _is_calibrated(document: Mapping[str, Any]) -> bool:
    """Some pruner looked at data."""
    return any(pruner["needs"] or pruner["update"] for pruner in document["pruners"])


def _asked(sparsity: float | Mapping[str, float]) -> str:
    if isinstance(sparsity, Mapping):
        return ", ".join(f"{region} {100 * value:.4g} %" for region, value in sparsity.items())
    return f"{100 * sparsity:.4g} %"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def _kappa(value: float) -> str:
    return f"{abs(value) if round(value, 2) == 0 else value:.2f}"


def further_metrics(document: Mapping[str, Any]) -> Sequence[str]:
    """Metrics that the table has no room for."""
    return metric_names(document)[MOST_METRICS:]
