"""What pruners keep after fine-tuning of one length and of another: which differences a longer one makes up for."""

from __future__ import annotations

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.configuration import LONG, Scale
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.orderings import HEADLINES
from benchmarks.tavlp.pruners import PRUNERS, SPARSITIES
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.summary import MISSING, Results, table, title

TASK = "retrieval"


def durations(results: Results, longer: Scale = LONG) -> str:
    """A table: rows of pruners that were fine-tuned longer, at the highest sparsity; the mean R@1 after both lengths, of the
    seeds that both have.

    Args:
        results: of the usual length.
        longer: the scale of the other; its results lie beside these.
    """
    own = results.folders
    other = Results(Folders.of(longer, own.results.parent, own.masks.parent), longer, results.seeds)
    rows = []
    for pruner in PRUNERS:
        shown = []
        for family in FAMILIES:
            one, two = (found.values(family, TASK, pruner, SPARSITIES[-1], HEADLINES[TASK]) for found in (results, other))
            shared = sorted(one.keys() & two.keys())
            shown += [Figure.of([values[seed] for seed in shared]) for values in (one, two)]
        if any(shown):
            rows.append([title(pruner), *(MISSING if figure is None else str(figure) for figure in shown)])
    if not rows:
        return f"Not done: `python -m benchmarks.tavlp run --scale {longer.name} --task {TASK}`."
    steps = [scale.recipes[TASK].steps for scale in (results.scale, longer)]
    return table(["mean R@1", *(f"{family}, {count} steps" for family in FAMILIES for count in steps)], rows)
