"""The page of tables, written from the results alone: docs/benchmark_tables.md and its pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.cells import Choice, cells
from benchmarks.tavlp.choosing import choice
from benchmarks.tavlp.configuration import LONG, Scale
from benchmarks.tavlp.differences import differences
from benchmarks.tavlp.durations import durations
from benchmarks.tavlp.families import FAMILIES, family
from benchmarks.tavlp.figures import draw_allocations, draw_highest_sparsity
from benchmarks.tavlp.orderings import HEADLINES, orderings
from benchmarks.tavlp.pruners import ABLATIONS, PRUNERS, ROWS, SEEDS, SPARSITIES
from benchmarks.tavlp.pruning import Folders, masks_of
from benchmarks.tavlp.ridge import RIDGES, ridges_of
from benchmarks.tavlp.ridge import SPARSITY as RIDGE_SPARSITY
from benchmarks.tavlp.summary import MISSING, NEAR, STANDARD_ERRORS, Results, table, title, with_best
from benchmarks.tavlp.tasks import TASKS

ALLOCATION_SPARSITY = 0.75
ALLOCATION_ROWS = ("without-distribution", "omp", "multiflow")
ABLATION_FAMILY = "xvlm"
VARIANT = "xvlm-text-x2"
STACK_ROWS = ("omp", "without-multimodality", "multiflow")
COMPARED = tuple(row.name for row in ROWS if row.criterion and row.name not in ABLATIONS[1:-1])
"""Rows of the large tables: all but the ablations, which have a table of their own."""


def write_page(folders: Folders, scale: Scale, docs: Path) -> Path:
    """Write the tables and draw the pictures; masks that a picture needs are made, nothing is fine-tuned.

    Args:
        folders: of the results.
        scale: only results of its configuration count.
        docs: gets benchmark_tables.md and images/benchmark_*.png.
    """
    results = Results(folders, scale)
    images = docs / "images"
    images.mkdir(exist_ok=True)
    for name in FAMILIES:
        for pruner in ALLOCATION_ROWS:
            if results.masks(name, PRUNERS[pruner], ALLOCATION_SPARSITY, 0) is None:
                masks_of(family(name), PRUNERS[pruner], ALLOCATION_SPARSITY, 0, scale, folders)
    draw_allocations(results, tuple(FAMILIES), ALLOCATION_ROWS, ALLOCATION_SPARSITY, images / "benchmark_allocations.png")
    draw_highest_sparsity(results, tuple(FAMILIES), COMPARED, SPARSITIES[-1], images / "benchmark_highest_sparsity.png")
    path = docs / "benchmark_tables.md"
    path.write_text("\n\n".join(_parts(results)) + "\n", encoding="utf-8")
    return path


def _parts(results: Results) -> Iterator[str]:
    yield "# Tables of the task-agnostic benchmark"
    yield (
        f"Written by `python -m benchmarks.tavlp tables --scale {results.scale.name}` from the files in "
        f"`benchmarks/results/tavlp/{results.scale.name}`; do not edit. What they mean is in [benchmark.md](benchmark.md). "
        f"All metrics are in per cent (CIDEr as papers print it), after fine-tuning with masks kept. `±` is the sample "
        f"standard deviation over seeds, of {', '.join(map(str, SEEDS))}, and the number in brackets says how many there are; "
        f"`{MISSING}` is a cell that has not been run. Bold is the largest mean of a column within a sparsity; "
        f"`{NEAR}` is within noise of it: less than {STANDARD_ERRORS:g} standard errors below, with the scatter over seeds "
        f"that all rows of a task have together."
    )
    yield _coverage(results)
    yield scatters(results)
    yield "## Cells made again"
    yield repeated(results.folders.results.parents[1] / "tavlp.json")
    yield "## Which pruner to choose"
    yield (
        "Retrieval as the mean R@1 of both directions, captioning as CIDEr, questions as accuracy. The last column is the "
        "mean, over the others, of what is left of the dense model's figure; rows stand in its order, "
        "rows with missing cells below."
    )
    yield choice(results)
    yield "## The paper's orderings"
    yield (
        f"Differences of two rows over the seeds that both have, in the metrics above, with their standard error. Less than "
        f"{STANDARD_ERRORS:g} of these errors are noise."
    )
    yield orderings(results)
    yield "## Retrieval (Tab. 1 of the paper)"
    yield comparison(results, ("retrieval",))
    yield "## Captioning and questions (Tab. 2)"
    yield comparison(results, ("captioning", "vqa"))
    yield f"## Ablations (Tab. 3), {ABLATION_FAMILY}"
    yield ablations(results)
    yield f"## All pruners at {100 * SPARSITIES[-1]:.0f} % (Fig. 3)"
    yield "![what each pruner keeps of the dense model at the highest sparsity](images/benchmark_highest_sparsity.png)"
    yield f"## Sparsity of every layer at {100 * ALLOCATION_SPARSITY:.0f} % (Fig. 4)"
    yield "![sparsity per layer and region under three allocations](images/benchmark_allocations.png)"
    yield regions(results)
    yield magnitudes(results)
    yield "## Fine-tuned for longer"
    yield (
        f"The same masks at {100 * SPARSITIES[-1]:.0f} %, fine-tuned four times as long (`--scale {LONG.name}`): "
        f"of the seeds that both have."
    )
    yield durations(results)
    yield "## What sets pruners apart"
    yield differences(results.scale, results.folders)
    yield "## Stacks of unequal size"
    yield (
        f"`{VARIANT}` computes what xvlm computes, with text weights of twice the size (`families/unequal.py`). Text removed "
        f"in % of its weights, mean R@1 of retrieval before and after fine-tuning."
    )
    yield stacks(results)
    yield "## Retrieval before fine-tuning"
    yield before(results)
    yield f"## CHITA's ridge, at {100 * RIDGE_SPARSITY:.0f} %"
    yield (
        "How far the kept weights move, in % of their size, and the pretraining loss of the pruned model on calibration data "
        "that no pruner saw (`python -m benchmarks.tavlp ridge`). The rows of the tables have "
        f"{results.scale.pruning['chita_ridge']:g}."
    )
    yield ridges(results)
    yield "## Cost of each pruner"
    yield costs(results)


def _coverage(results: Results) -> str:
    done, there = results.count(list(cells(Choice(), FAMILIES)))
    rows = []
    for name in FAMILIES:
        for task in TASKS:
            counts = [results.count(list(cells(Choice((name,), (task,), seeds=(seed,)), FAMILIES))) for seed in SEEDS]
            rows.append([f"{name}, {task}", *(f"{done} of {there}" for done, there in counts)])
    return f"{done} of {there} cells are there.\n\n" + table(["cells", *(f"seed {seed}" for seed in SEEDS)], rows)


def scatters(results: Results) -> str:
    """How far seeds scatter, by metric."""
    rows = []
    for task, found in TASKS.items():
        for metrics, name in [((metric,), name) for metric, name in found.metrics.items()] + [(HEADLINES[task], "mean of R@1")]:
            value = results.scatter(task, metrics)
            if value is not None and (len(metrics) > 1 or name != "mean of R@1"):
                rows.append([f"{task}, {name}", f"{value:.1f}"])
    if not rows:
        return "No row has two seeds, so that nothing is known of noise."
    return table(["metric", "standard deviation over seeds, all rows together"], rows)


def repeated(path: Path) -> str:
    """How far cells that were made again differ from those that are kept: what rounding alone is worth.

    Args:
        path: what ``benchmarks/run.py --only tavlp`` wrote.
    """
    command = "`python benchmarks/run.py --only tavlp`"
    if not path.is_file():
        return f"Not done: {command}."
    rows = []
    for name, found in json.loads(path.read_text(encoding="utf-8")).items():
        if "largest_difference" in found:
            kept, again = ((found[f"{prefix}tr1"] + found[f"{prefix}ir1"]) / 2 for prefix in ("kept_", ""))
            rows.append([name, f"{kept:.1f}", f"{again:.1f}", f"{found['largest_difference']:.1f}"])
    return (
        f"By {command}, beside the cells that were kept at that time.\n\n"
        f"{table(['cell', 'mean R@1 kept', 'mean R@1 again', 'largest difference of a metric'], rows)}"
    )


def comparison(results: Results, tasks: Sequence[str]) -> str:
    """Rows of all pruners by sparsity, columns of all families and metrics of some tasks."""
    columns = [(name, task, metric) for name in FAMILIES for task in tasks for metric in TASKS[task].metrics]
    headings = ["sparsity, pruner", *(f"{name} {TASKS[task].metrics[metric]}" for name, task, metric in columns)]
    noise = [results.scatter(task, (metric,)) for name, task, metric in columns]
    rows = [["DENSE", *(_text(results.figure(name, task, "dense", 0.0, metric)) for name, task, metric in columns)]]
    for sparsity in SPARSITIES:
        figures = [
            [results.figure(name, task, pruner, sparsity, metric) for pruner in COMPARED] for name, task, metric in columns
        ]
        rows += [
            [f"{100 * sparsity:.0f} % {title(pruner)}", *shown]
            for pruner, shown in zip(COMPARED, with_best(figures, noise), strict=True)
        ]
    return table(headings, rows)


def ablations(results: Results) -> str:
    """R@1 of both directions for MULTIFLOW and what is left of it without its parts."""
    columns = [(sparsity, metric) for sparsity in SPARSITIES for metric in ("tr1", "ir1")]
    names = TASKS["retrieval"].metrics
    figures = [
        [results.figure(ABLATION_FAMILY, "retrieval", pruner, sparsity, metric) for pruner in ABLATIONS]
        for sparsity, metric in columns
    ]
    noise = [results.scatter("retrieval", (metric,)) for _, metric in columns]
    rows = [[title(pruner), *shown] for pruner, shown in zip(ABLATIONS, with_best(figures, noise), strict=True)]
    return table(["pruner", *(f"{100 * sparsity:.0f} % {names[metric]}" for sparsity, metric in columns)], rows)


def before(results: Results) -> str:
    """R@1 as pruned, before any fine-tuning: seeds differ in their calibration data alone."""
    columns = [(name, sparsity) for name in FAMILIES for sparsity in SPARSITIES]
    pruners = ["dense", *(row.name for row in ROWS if row.criterion)]
    figures = [
        [results.untuned(name, "retrieval", pruner, sparsity, *HEADLINES["retrieval"]) for pruner in pruners]
        for name, sparsity in columns
    ]
    rows = [[title(pruner), *map(_text, shown)] for pruner, shown in zip(pruners, zip(*figures, strict=True), strict=True)]
    return table(["mean R@1", *(f"{name} {100 * sparsity:.0f} %" for name, sparsity in columns)], rows)


def regions(results: Results) -> str:
    """Fraction removed by region at the sparsity of the picture, as achieved."""
    rows = []
    headings: list[str] = []
    for name in FAMILIES:
        for row in ROWS:
            record = results.masks(name, row, ALLOCATION_SPARSITY, 0) if row.criterion else None
            if record is not None:
                found = {"all": record["sparsity"], **record["region_sparsity"]}
                headings += [region for region in found if region not in headings]
                rows.append((f"{name}, {row.title}", found))
    shown = [
        [label, *(f"{100 * found[region]:.2f}" if region in found else MISSING for region in headings)] for label, found in rows
    ]
    return table(["removed, in %", *headings], shown)


def stacks(results: Results) -> str:
    """What groups by region are for: the same model with stacks of like and of unequal size."""
    rows = []
    for pruner, family_name in product(STACK_ROWS, (ABLATION_FAMILY, VARIANT)):
        shown = []
        for sparsity in SPARSITIES:
            record = results.masks(family_name, PRUNERS[pruner], sparsity, 0)
            removed = MISSING if record is None else f"{100 * record['region_sparsity']['text']:.1f}"
            place = (family_name, "retrieval", pruner, sparsity)
            tuned = Figure.of(list(results.values(*place, HEADLINES["retrieval"]).values()))
            shown += [removed, _text(results.untuned(*place, *HEADLINES["retrieval"])), _text(tuned)]
        rows.append([f"{title(pruner)}, {family_name}", *shown])
    kinds = ("text removed", "before", "after")
    return table(["pruner, family", *(f"{100 * sparsity:.0f} % {kind}" for sparsity, kind in product(SPARSITIES, kinds))], rows)


def magnitudes(results: Results) -> str:
    """How large the pretrained weights of every region are, which is all that Eq. 7 of the paper goes by."""
    rows = []
    for name in FAMILIES:
        record = results.masks(name, PRUNERS["multiflow"], ALLOCATION_SPARSITY, 0)
        if record is None:
            continue
        model = family(name).build()
        for region in dict.fromkeys(record["layer_region"].values()):
            members = [fqn for fqn, found in record["layer_region"].items() if found == region]
            weights = torch.cat([model.get_parameter(fqn).detach().abs().flatten() for fqn in members])
            root = weights.square().mean().sqrt()
            rows.append([f"{name}, {region}", f"{len(weights):,}", f"{weights.median():.4f}", f"{root:.4f}"])
    return table(["pretrained weights", "count", "median size", "root of mean square"], rows)


def ridges(results: Results) -> str:
    """What each ridge does to every family."""
    found = {name: ridges_of(family(name), results.scale, results.folders, is_made=False) for name in FAMILIES}
    kinds = ("moved", "loss")
    rows = []
    for place, ridge in enumerate(RIDGES):
        shown = [
            (MISSING, MISSING) if made is None else (f"{100 * made[place]['moved']:.2g}", f"{made[place]['loss']:.2f}")
            for made in found.values()
        ]
        rows.append([f"{ridge:g}", *(cell for pair in shown for cell in pair)])
    return table(["ridge", *(f"{name} {kind}" for name, kind in product(FAMILIES, kinds))], rows)


def costs(results: Results) -> str:
    """What masks cost: passes over batches, seconds of the process, memory."""
    rows = []
    for name in FAMILIES:
        for row in ROWS:
            if row.criterion is None:
                continue
            records = [results.masks(name, row, sparsity, seed) for sparsity in SPARSITIES for seed in SEEDS]
            found = [record["cost"] for record in records if record is not None]
            if found:
                rows.append(
                    [
                        f"{name}, {row.title}",
                        str(found[0]["forward_batches"]),
                        str(found[0]["backward_batches"]),
                        f"{median(cost['calibrate_s'] for cost in found):.1f}",
                        f"{median(cost['select_s'] for cost in found):.1f}",
                        f"{median(cost['memory_rise_mib'] for cost in found):.0f}",
                        _moved([record.get("kept_weights_moved") for record in records if record is not None]),
                    ]
                )
    headings = ["pruner", "forward batches", "backward batches", "calibration, s", "selection, s", "memory, MiB", "moved, %"]
    size = results.scale.calibration[1]
    return table(headings, rows) + (
        f"\n\nOf one sparsity: batches of {size} pairs, seconds of processor time (median over sparsities and seeds), rise of "
        f"resident memory while weights are chosen. Calibration (of SNIP: mean gradients) serves all sparsities of a seed. "
        f"Moved: how far an update moves the weights that stay, in % of their size."
    )


def _moved(shares: Sequence[float | None]) -> str:
    known = [100 * share for share in shares if share is not None]
    return f"{median(known):.0f}" if known else MISSING


def _text(figure: Figure | None) -> str:
    return MISSING if figure is None else str(figure)
