"""What pruners keep after fine-tuning of one length and of another: which differences a longer one makes up for."""

from __future__ import annotations

from benchmarks.over_seeds import Figure
from benchmarks.tavlp.configuration import LONG, Scale
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.orderings import HEADLINES, headline_title
from benchmarks.tavlp.pruners import PRUNERS, SPARSITIES
from benchmarks.tavlp.pruning import Folders
from benchmarks.tavlp.summary import MISSING, Results, table, title
from benchmarks.tavlp.tasks import TASKS


def durations(results: Results, longer: Scale = LONG) -> str:
    """A table a task: rows of pruners that were fine-tuned longer, at the highest sparsity; the headline after both lengths,
    of the seeds that both have.

    Args:
        results: of the usual length.
        longer: the scale of the other; its results lie beside these.
    """
    own = results.folders
    other = Results(Folders.of(longer, own.results.parent, own.masks.parent), longer, results.seeds)
    found = [text for text in (_table(task, results, other) for task in TASKS) if text]
    return "\n\n".join(found) or f"Not done: `python -m benchmarks.tavlp run --scale {longer.name}`."


def _table(task: str, results: Results, other: Results) -> str:
    found = {(family, pruner): _pair(family, task, pruner, results, other) for family in FAMILIES for pruner in PRUNERS}
    families = [family for family in FAMILIES if any(any(found[family, pruner]) for pruner in PRUNERS)]
    rows = []
    for pruner in PRUNERS:
        shown = [figure for family in families for figure in found[family, pruner]]
        if any(shown):
            rows.append([title(pruner), *(MISSING if figure is None else str(figure) for figure in shown)])
    steps = [length.scale.recipes[task].steps for length in (results, other)]
    headings = [f"{family}, {count} steps" for family in families for count in steps]
    return table([f"{task}, {headline_title(task)}", *headings], rows) if rows else ""


def _pair(family: str, task: str, pruner: str, results: Results, other: Results) -> list[Figure | None]:
    """The headline in both, over the seeds that both have."""
    both = [length.values(family, task, pruner, SPARSITIES[-1], HEADLINES[task]) for length in (results, other)]
    shared = sorted(both[0].keys() & both[1].keys())
    return [Figure.of([values[seed] for seed in shared]) for values in both]
