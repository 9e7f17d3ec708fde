"""The rows of the tables: dense, the pruners, MULTIFLOW's ablations, and what goes beyond the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PrunerRow:
    """A pruner by the names that ``mfcompile.select_masks`` knows.

    Attributes:
        name: in results and on the command line.
        title: in tables.
        criterion: None leaves the model dense.
        allocation: None for that of the criterion.
        update: rewriting of the kept weights.
        is_seeded: whether another seed gives other masks (data, or random scores); the others are made once.
        needs_statistics: whether calibration is part of its cost.
        needs_batches: whether it runs the model itself.
        shares_gradients: whether the mean gradients of the dense model, which serve all sparsities, are all it asks the loss.
        passes: option that counts how often the model is run -> key of the scale's ``pruning`` options.
    """

    name: str
    title: str
    criterion: str | None
    allocation: str | None = None
    update: str | None = None
    is_seeded: bool = True
    needs_statistics: bool = False
    needs_batches: bool = False
    shares_gradients: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_loss(self) -> bool:
        """Whether it takes gradients; updates run the model forward alone."""
        return self.needs_batches and self.update is None

    @property
    def asks_for(self) -> str:
        """What a user must give it besides the model."""
        if self.needs_loss:
            return "a loss and its gradients"
        return "calibration data" if self.needs_statistics or self.needs_batches else "nothing"

    def criterion_options(self, pruning: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the criterion at a scale."""
        return {option: pruning[key] for option, key in self.options.items()}


_CHITA = {"gradients": "chita_gradients", "ridge": "chita_ridge"}

ROWS = (
    PrunerRow("dense", "DENSE", None, is_seeded=False),
    PrunerRow("random", "RANDOM", "random"),
    PrunerRow("snip", "SNIP", "snip", needs_batches=True, shares_gradients=True),
    PrunerRow(
        "itersnip",
        "ITERSNIP",
        "itersnip",
        needs_batches=True,
        options={"steps": "itersnip_steps", "batches_per_step": "itersnip_batches"},
    ),
    PrunerRow("omp", "OMP", "magnitude", is_seeded=False),
    PrunerRow("lamp", "LAMP", "lamp", is_seeded=False),
    PrunerRow("wanda", "WANDA", "wanda", needs_statistics=True),
    PrunerRow("chita", "CHITA", "chita", needs_batches=True, options=_CHITA),
    PrunerRow("chita++", "CHITA++", "chita++", needs_batches=True, options={**_CHITA, "steps": "chita_steps"}),
    PrunerRow("multiflow", "MULTIFLOW", "multiflow", needs_statistics=True),
    PrunerRow("inversion", "inversion", "multiflow-inverted", needs_statistics=True),
    PrunerRow("without-distribution", "w/o distribution", "multiflow", "score-global", needs_statistics=True),
    PrunerRow("without-multimodality", "w/o multimodality", "multiflow", "magnitude-global", needs_statistics=True),
    PrunerRow(
        "multiflow+sparsegpt",
        "MULTIFLOW + SparseGPT",
        "multiflow",
        update="sparsegpt",
        needs_statistics=True,
        needs_batches=True,
    ),
    PrunerRow(
        "multiflow+least-squares",
        "MULTIFLOW + least squares",
        "multiflow",
        update="least-squares",
        needs_statistics=True,
        needs_batches=True,
    ),
    PrunerRow(
        "multiflow+gradual",
        "MULTIFLOW + gradual",
        "multiflow",
        update="gradual",
        needs_statistics=True,
        needs_batches=True,
    ),
)
PRUNERS = {row.name: row for row in ROWS}
BASELINES = ("random", "snip", "itersnip", "omp", "lamp", "wanda", "chita", "chita++")
ABLATIONS = ("random", "inversion", "without-distribution", "without-multimodality", "multiflow")
SPARSITIES = (0.63, 0.75, 0.9)
SEEDS = (0, 1, 2)
