"""TAMT: masks that are trained, under weights that are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mfcompile.errors import CalibrationError, InputError
from mfcompile.masks import MaskSet
from mfcompile.passes.criteria.base import Criterion, Need, Pruner, SiteData
from mfcompile.passes.criteria.magnitude import Magnitude
from mfcompile.passes.gradients import LossRunner, unused_weights
from mfcompile.passes.iteration import BatchCycle, check_count
from mfcompile.passes.losses import batch_count
from mfcompile.passes.mask_selection import site_weight
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.selection import magnitude_threshold
from mfcompile.passes.sparsity_patterns import NOfM


@dataclass(frozen=True)
class Tamt(Pruner):
    """Task-agnostic mask training (Liu et al., "Learning to Win Lottery Tickets in BERT Transfer via Task-agnostic Mask
    Training", NAACL 2022), with one threshold over all layers.

    Every weight has a trained score M; the largest stay. In the forward pass the mask multiplies the weight, in the backward
    pass M receives the mask's gradient as it is (straight-through): dL/dM = dL/d(m w) w. AdamW, the learning rate falling to
    zero in a line, in training mode (dropout). M starts as 2 t where magnitude pruning of each layer keeps the weight, else 0,
    with t the magnitude at which magnitude pruning of the whole model cuts.

    Two defects of MULTIFLOW's published code are not reproduced. It compares equal scores with themselves, so that its first
    batch runs with no weight at all; here as many weights as are to stay run from the first batch on. And it ranks |M|, whose
    gradient is zero where M is: what the start prunes never returns, and training only drops the one weight per layer that its
    start has too many. Here M keeps its sign, as in the method's own paper.

    Attributes:
        steps: batches to train on, read again from the start where calibration has fewer; None reads each once.
        learning_rate: of the first batch.
        weight_decay: AdamW's.
    """

    name: ClassVar[str] = "tamt"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENTS})
    steps: int | None = None
    learning_rate: float = 5e-5
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_count("steps", self.steps)
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a number that is not negative, got {value!r}")

    def choose(self, run: PruningRun) -> MaskSet:
        """The masks after training."""
        assert run.batches is not None
        assert run.loss_fn is not None
        scores = initial_scores(run)
        optimizer = torch.optim.AdamW(list(scores.values()), lr=self.learning_rate, weight_decay=self.weight_decay)
        runner = LossRunner(run.captured.module, run.loss_fn, scores, training=True)
        with runner.seeded(run.seed):  # on its own: counting may draw, and must not change what training draws
            steps = self.steps or _count(run.batches())
        # Exact at every step: the published rule prunes every tie, and equal scores are what training starts from.
        inner = replace(run, rounding="exact", progress=None)
        cycle, unused = BatchCycle(run.batches), dict.fromkeys(scores)
        with runner.seeded(run.seed):
            for step in range(steps):
                runner.set_weights(None, inner.select(_Trained(), gradients=scores))
                runner.backward(next(cycle.take(1)), step)
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * (1 - step / steps)
                for fqn, score in scores.items():
                    gradient = runner.gradient_sum(fqn)
                    if gradient is not None:
                        unused.pop(fqn, None)
                    score.grad = score_gradient(gradient, run.captured.parameter(fqn), score, fqn, step)
                optimizer.step()
                runner.clear()
                if run.progress is not None:
                    run.progress(step + 1, steps)
        masks = replace(run, progress=None).select(_Trained(), gradients=scores)
        return replace(
            masks, diagnostics=(*masks.diagnostics, *unused_weights(unused), *cycle.diagnostics(self.name, steps, 1))
        )


def _count(batches: Iterable[Any]) -> int:
    """Number of batches, read where it is not known.

    Raises:
        CalibrationError: there is none.
    """
    known = batch_count(batches)
    count = sum(1 for _ in batches) if known is None else known
    if not count:
        raise CalibrationError("there is no batch to train masks on: pass at least one batch")
    return count


def initial_scores(run: PruningRun) -> dict[str, Tensor]:
    """M before training: FQN -> float32 in the layout of the parameter.

    With an allocation other than the pruner's own, layers keep as many weights as it gives them.
    """
    allocation, sparsity = run.allocation, run.sparsity
    if allocation in (None, "score-global", "score-per-region"):
        if allocation == "score-per-region" and isinstance(sparsity, float):
            sparsity = dict.fromkeys(run.regions.by_region(), sparsity)
        allocation = None if isinstance(run.pattern, NOfM) else "uniform"
    start = replace(run, allocation=allocation, sparsity=sparsity, rounding="exact", progress=None)
    masks = start.select(Magnitude())
    cuts = _cuts(run)
    return {
        fqn: (2 * cuts[sites[0].region] * masks[fqn].float()).to(run.captured.parameter(fqn).device)
        for fqn, sites in run.sites_by_fqn.items()
    }


def _cuts(run: PruningRun) -> dict[str, float]:
    """Region -> t, the magnitude at which magnitude pruning cuts: the same for all, unless each has a sparsity of its own."""
    sites = run.regions.pruned_sites
    groups = run.regions.by_region() if not isinstance(run.sparsity, float) else {"": sites}
    found = {}
    for region, members in groups.items():
        sparsity = run.sparsity if isinstance(run.sparsity, float) else run.sparsity[region]
        k = max(int(sparsity * sum(site.weight_count for site in members)), 1)
        weights = [lambda site=site: site_weight(run.captured, site) for site in members]
        found[region] = magnitude_threshold(weights, k, [site.name for site in members]).value
    return found if "" not in found else dict.fromkeys(run.regions.by_region(), found[""])


def score_gradient(gradient: Tensor | None, weight: Tensor, score: Tensor, fqn: str, step: int) -> Tensor:
    """dL/dM = dL/d(m w) w, from the gradient with respect to the masked weight, which is used up.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    if gradient is None:
        return torch.zeros_like(score)
    found = gradient.float().mul_(weight.detach())
    if not bool(torch.isfinite(found).all()):
        raise CalibrationError(
            f"the gradient of {fqn} holds NaN or infinity in batch {step}: its mask cannot be trained. Check this batch "
            f"and the loss"
        )
    return found


@dataclass(frozen=True)
class _Trained(Criterion):
    """M, which stands in the place of gradients."""

    name: ClassVar[str] = "tamt"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.GRADIENTS})

    def score(self, site: SiteData) -> Tensor:
        assert site.gradient is not None
        return site.gradient
