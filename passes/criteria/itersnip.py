"""ITERSNIP: SNIP in many steps, each on the model that the last one left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mfcompile.graph import Diagnostic
from mfcompile.masks import MaskSet
from mfcompile.passes.criteria.base import Need, Pruner
from mfcompile.passes.criteria.snip import Snip
from mfcompile.passes.gradients import LossRunner
from mfcompile.passes.iteration import BatchCycle, check_count, check_schedule, sparsity_at
from mfcompile.passes.pruning_run import PruningRun


@dataclass(frozen=True)
class IterSnip(Pruner):
    """SNIP iterated under a growing sparsity (de Jorge et al., "Progressive Skeletonization", ICLR 2021).

    Step t prunes to s_t by |g w| with the gradient g of the model that is masked so far, over batches of its own; what is
    gone does not return. Only masks come out: weights keep the model's values.

    Two things differ from the published code: its schedule "linear" overshoots the sparsity and is replaced by s t/T; and
    where calibration has fewer batches than the steps need, they are read again, while the published code stops early,
    short of the sparsity that was asked for.

    Attributes:
        steps: T.
        batches_per_step: batches of one step; where calibration has fewer, each once.
        schedule: "exp", "linear" or "const".
    """

    name: ClassVar[str] = "itersnip"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENTS})
    steps: int = 60
    batches_per_step: int = 50
    schedule: str = "exp"

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("batches_per_step", self.batches_per_step)
        check_schedule(self.schedule)

    def choose(self, run: PruningRun) -> MaskSet:
        """The masks of the last step; a pattern that sets the sparsity itself (2:4) leaves room for one step only."""
        assert run.batches is not None
        assert run.loss_fn is not None
        steps = 1 if run.pattern.fixed_sparsity is not None else self.steps
        cycle = BatchCycle(run.batches)
        runner = LossRunner(run.captured.module, run.loss_fn, run.sites_by_fqn)
        unused: list[Diagnostic] = []

        def gradients(step: int, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            runner.set_weights(None, masks)
            found = runner.accumulate(cycle.take(self.batches_per_step))
            if step == 1:
                unused.extend(found.diagnostics)
            if run.progress is not None:
                run.progress(step, steps)
            return found.gradients

        with runner.seeded(run.seed):
            masks = iterate(replace(run, progress=None), steps, self.schedule, gradients)
        more = [*unused, *cycle.diagnostics(self.name, steps, self.batches_per_step)]
        if steps != self.steps:
            more.append(Diagnostic(self.name, "the pattern sets the sparsity, so that all is pruned in one step"))
        return replace(masks, diagnostics=(*masks.diagnostics, *more))


def iterate(
    run: PruningRun, steps: int, schedule: str, gradients: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> MaskSet:
    """Prune step by step.

    Args:
        run: the run, at the sparsity of the last step.
        steps: T.
        schedule: see ``iteration.sparsity_at``.
        gradients: (step, FQN -> mask in force) -> FQN -> mean gradient of the model under these masks.
    """
    masks: Mapping[str, Tensor] = {}
    for step in range(1, steps + 1):
        at_step = run.at_sparsity(lambda sparsity, step=step: sparsity_at(schedule, sparsity, step, steps))  # type: ignore[misc]
        pruned = {fqn: ~mask for fqn, mask in masks.items()} or None
        chosen = at_step.select(Snip(), gradients=gradients(step, masks), pruned=pruned)
        masks = chosen
    return chosen
