"""CHITA and CHITA++: weights chosen together, and the kept ones moved to make up for those that go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.allocation import Request, allocate, groups_of
from mfcompile.passes.chita_solver import solve
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.gradient_rows import Columns, gradient_rows
from mfcompile.passes.gradients import LossRunner, unused_weights
from mfcompile.passes.iteration import BatchCycle, check_count, check_schedule, sparsity_at
from mfcompile.passes.losses import sample_count
from mfcompile.passes.mask_selection import parameter_mask, site_weight
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.sparsity_patterns import Pattern, Unstructured
from mfcompile.region import PruneSite


@dataclass(frozen=True)
class Chita(Pruner):
    """CHITA (Benbaki et al., "Fast as CHITA", ICML 2023), the blockwise heuristic: masks and new values of kept weights.

    See ``chita_solver`` for the mathematics and for the two defects of the published code that are not reproduced. A row of
    the Fisher matrix is the gradient of one batch; the matrix takes 4 bytes per row and weight (50 rows of 184 M weights:
    37 GB), and is refused where the machine has less.

    An allocation by score (its own) leaves the number of weights of every block to CHITA; any other sets those of every layer,
    which is then a problem of its own. With sparsities by region every region is a problem of its own.

    Attributes:
        gradients: rows, n; where calibration has fewer batches, one row each.
        ridge: lambda.
        block_size: weights of a block, at least, in layers that have as many.
        samples: samples behind a row, b; None counts those of the first batch.
    """

    name: ClassVar[str] = "chita"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENTS})
    gradients: int = 50
    ridge: float = 1e-5
    block_size: int = 10_000
    samples: int | None = None

    def __post_init__(self) -> None:
        check_count("gradients", self.gradients)
        check_count("block_size", self.block_size)
        if self.samples is not None:
            check_count("samples", self.samples)
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 < self.ridge < float("inf"):
            raise InputError(f"ridge must be a positive number, got {self.ridge!r}: without it the weights are not determined")

    def check_pattern(self, pattern: Pattern) -> None:
        """Single weights only.

        Raises:
            InputError: it is another pattern.
        """
        if not isinstance(pattern, Unstructured):
            raise InputError(
                f"the criterion {self.name!r} chooses single weights together, not in patterns: use pattern='unstructured', "
                f"or another criterion (snip, multiflow with update='sparsegpt')"
            )

    def choose(self, run: PruningRun) -> MaskSet:
        """Masks and new values."""
        return prune(self, run, 1, "const")


@dataclass(frozen=True)
class IteratedChita(Chita):
    """CHITA++: CHITA in many steps, each with gradients of the model that the last one pruned and updated.

    The schedule is the one of MULTIFLOW's published code (Farina et al., CVPR 2024), that of ITERSNIP; CHITA's authors use
    another.

    Attributes:
        steps: T.
        schedule: "exp", "linear" or "const".
    """

    name: ClassVar[str] = "chita++"
    steps: int = 60
    schedule: str = "exp"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_schedule(self.schedule)

    def choose(self, run: PruningRun) -> MaskSet:
        """Masks and new values of the last step."""
        return prune(self, run, self.steps, self.schedule)


def prune(options: Chita, run: PruningRun, steps: int, schedule: str) -> MaskSet:
    """Prune in ``steps`` steps.

    Raises:
        InputError: the pattern or the allocation is none that CHITA can follow.
        CalibrationError: a loss is not usable, or the gradients do not fit into memory.
    """
    assert run.batches is not None
    assert run.loss_fn is not None
    options.check_pattern(run.pattern)
    weights = FlatWeights(run)
    cycle, samples = BatchCycle(run.batches), options.samples
    runner = LossRunner(run.captured.module, run.loss_fn, run.sites_by_fqn)
    with runner.seeded(run.seed):
        for step in range(1, steps + 1):
            at_step = run.at_sparsity(lambda sparsity, step=step: sparsity_at(schedule, sparsity, step, steps))  # type: ignore[misc]
            batches = cycle.take(options.gradients)
            if samples is None:
                first = next(batches)
                batches, samples = chain([first], batches), sample_count(first)
            rows = gradient_rows(runner, batches, weights.columns, options.gradients)
            if step == 1:
                unused = unused_weights(weights.without_gradient(rows))
            weights.update(at_step, rows, options, samples)
            del rows  # before the next step's are made
            if step < steps:
                runner.set_weights(weights.values, weights.masks)
            if run.progress is not None:
                run.progress(step, steps)
    masks = run.mask_set(
        {fqn: PackedMask.pack(mask) for fqn, mask in weights.masks.items()},
        {fqn: weights.values[fqn][mask] for fqn, mask in weights.masks.items()},
    )
    return replace(masks, diagnostics=(*masks.diagnostics, *unused, *cycle.diagnostics(options.name, steps, options.gradients)))


class FlatWeights:
    """The weights of all sites in a row, and as parameters.

    Attributes:
        columns: what a gradient row holds, site after site.
        values: FQN -> current values, in the layout and dtype of the parameter.
        masks: FQN -> bool, what stays.
    """

    def __init__(self, run: PruningRun) -> None:
        self._run = run
        self._sites = run.regions.pruned_sites
        sizes = [site.weight_count for site in self._sites]
        self._starts = dict(zip((site.name for site in self._sites), accumulate(sizes, initial=0), strict=False))
        self.columns = [Columns(site.fqn, site.weight_count, _part(site)) for site in self._sites]
        self._alive: Tensor | None = None
        self.values = {fqn: run.captured.parameter(fqn).detach().cpu() for fqn in run.sites_by_fqn}
        self.masks: dict[str, Tensor] = {}

    def update(self, run: PruningRun, rows: Tensor, options: Chita, samples: float) -> None:
        """Solve for masks and values at the sparsity of the run."""
        flat = torch.cat([_part(site)(self.values[site.fqn]).reshape(-1).float() for site in self._sites])
        support = torch.zeros_like(flat, dtype=torch.bool)
        for sites, kept in _problems(run):
            # A region's layers need not lie together in a row; one layer's weights do, and so do all.
            places = self._places(sites)
            alive = None if self._alive is None else self._alive[places]
            layers = [site.weight_count for site in sites]
            solution = solve(
                rows[:, places], flat[places], layers, kept, samples=samples, ridge=options.ridge,
                block_size=options.block_size, alive=alive,
            )  # fmt: skip
            support[places], flat[places] = solution.support, solution.weights
        self._alive = support
        for fqn, sites in run.sites_by_fqn.items():
            self.values[fqn] = self._parameter(sites, flat)
            self.masks[fqn] = parameter_mask(run.captured, sites, lambda site: self._matrix(site, support))

    def without_gradient(self, rows: Tensor) -> Iterator[str]:
        """Names of the sites whose gradient is zero in all rows."""
        for site in self._sites:
            start = self._starts[site.name]
            if not bool(rows[:, start : start + site.weight_count].any()):
                yield site.name

    def _matrix(self, site: PruneSite, flat: Tensor) -> Tensor:
        start = self._starts[site.name]
        return flat[start : start + site.weight_count].reshape(site.out_features, site.in_features)

    def _places(self, sites: Sequence[PruneSite]) -> slice | Tensor:
        if len(sites) == len(self._sites):
            return slice(None)
        ranges = [range(self._starts[site.name], self._starts[site.name] + site.weight_count) for site in sites]
        if all(one.stop == two.start for one, two in pairwise(ranges)):
            return slice(ranges[0].start, ranges[-1].stop)
        return torch.cat([torch.arange(item.start, item.stop, device="cpu") for item in ranges])

    def _parameter(self, sites: Sequence[PruneSite], flat: Tensor) -> Tensor:
        """The parameter with the values of its sites; rows of no site keep theirs."""
        old, layout = self.values[sites[0].fqn], sites[0].layout
        matrices = layout.matrices(old).clone()
        for site in sites:
            site.matrix(matrices).copy_(self._matrix(site, flat))
        return layout.stored(matrices, old.shape)


def _part(site: PruneSite) -> Callable[[Tensor], Tensor]:
    return lambda parameter: site.matrix(site.layout.matrices(parameter))


def _problems(run: PruningRun) -> Iterator[tuple[Sequence[PruneSite], int]]:
    """Sites that are one problem, and how many of their weights stay."""
    sites = run.regions.pruned_sites
    request = Request(sites, run.sparsity, lambda site: site_weight(run.captured, site), _no_score, run.pattern, run.rounding)
    allocation = run.allocation or ("score-per-region" if isinstance(run.sparsity, Mapping) else "score-global")
    if allocation in ("score-global", "score-per-region"):
        for group, members in groups_of(allocation, request).items():
            sparsity, count = request.sparsity_of(group), sum(site.weight_count for site in members)
            # The published code rounds the kept count down, all others round the pruned count down.
            yield members, int((1 - sparsity) * count) if run.rounding == "official" else count - int(sparsity * count)
        return
    budget = allocate(allocation, request)
    if budget.by_row:
        raise InputError(f"CHITA sets no budget by row: allocation={allocation!r} cannot be followed; use 'uniform'")
    for site in sites:
        yield [site], site.weight_count - budget.pruned[site.name]


def _no_score(site: PruneSite) -> Tensor:
    raise AssertionError(f"an allocation that is not by score asked for the score of {site.name}")
