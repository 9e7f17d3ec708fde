"""Weight updates: kept weights make up for pruned ones, layer by layer, whatever chose the masks.

The inputs of a layer come from the model whose earlier layers are pruned and rewritten already; see ``update_stages`` for
what is earlier. How a layer is rewritten is the affair of each update: ``sparsegpt``, ``least_squares``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.graph import Diagnostic
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.passes.calibration import plan_padding, repeated_weights, run_batches
from mfcompile.passes.gram import GramCollector
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.random_numbers import seeded
from mfcompile.passes.reconstruction import RowReconstructor
from mfcompile.passes.sparsity_patterns import Pattern
from mfcompile.passes.update_stages import SiteGroup, group_sites, plan_stages
from mfcompile.passes.weight_values import with_values
from mfcompile.region import PruneSite


@dataclass(frozen=True)
class UpdateOptions(ABC):
    """How kept weights are rewritten: what all updates have in common.

    Attributes:
        name: what users call the update.
        damping: what is added to the diagonal of X^T X, as a fraction of its mean.
        memory_mib: what the matrices X^T X that are collected at a time may take; less makes more passes. Besides, the
            weights that are rewritten exist twice, and a layer takes some 36 * in_features^2 bytes while it is solved.
        passes: how many times the calibration batches are run, if the memory allows; None for one pass per depth. In each,
            the layers of one stretch of the model are rewritten, and the next sees what became of them. One layer at a time
            is what was published for stacks of some dozen layers; a few stretches come to nearly the same, at a fraction of
            the cost.
        padding_mask: name of the mask input of the text; None finds it by convention and shape.
        num_samples: stop after the batch that reaches this many samples; None uses all.
    """

    name: ClassVar[str]
    damping: float = 0.01
    memory_mib: float = 1024.0
    passes: int | None = 4
    padding_mask: str | None = None
    num_samples: int | None = None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """Options by name.

        Raises:
            InputError: one is unknown or not valid.
        """
        known = [item.name for item in fields(cls)]
        for name in given:
            if name not in known:
                raise InputError(f"{cls.name} has no option {name!r}; its options are {', '.join(known)}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name in ("damping", "memory_mib"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < float("inf"):
                raise InputError(f"{self.name}: {name} is a number of at least 0, got {value!r}")
        for name in ("passes", "num_samples"):
            if getattr(self, name) is not None:
                self._check_count(name)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise InputError(f"{self.name}: {name} is a positive integer, got {value!r}")

    @abstractmethod
    def solver(self, gram: Tensor, pattern: Pattern) -> RowReconstructor:
        """What rewrites the matrices whose input has this Gram matrix.

        Args:
            gram: (in_features, in_features) X^T X, finite, not all zero.
            pattern: in which weights were removed, for an update that chooses others.

        Raises:
            ArithmeticError: nothing can be solved with it.
        """


@dataclass(frozen=True)
class SiteUpdate:
    """What became of one site.

    Attributes:
        name: the site.
        masked_error: squared error of its output over all calibration tokens before the update, with its own inputs.
        error: the same after it.
        left: why its values were left as they were; None where they changed.
    """

    name: str
    masked_error: float
    error: float
    left: str | None = None


def update_weights(run: PruningRun, masks: MaskSet, options: UpdateOptions) -> MaskSet:
    """New values for the kept weights of every masked site; the masks stay as they are, unless the update chooses anew.

    The same batches give the same values to the last bits of float32, however they are cut into batches; with values
    stored in half precision some of these bits show.

    Args:
        run: what is pruned; its batches are run once per stage.
        masks: the masks, perhaps with values of an update that is better than none; these stay where they are better.
        options: which update, and how.

    Returns:
        The masks with new values; a diagnostic names every site that is left as it was.

    Raises:
        InputError: the model is an ONNX file, or cannot be copied.
        CalibrationError: there is no batch, or one that the model refuses.
    """
    return updated(run, masks, options)[0]


def updated(run: PruningRun, masks: MaskSet, options: UpdateOptions) -> tuple[MaskSet, list[SiteUpdate]]:
    """``update_weights``, with what became of every site, in the order in which they were rewritten."""
    if run.captured.frontend == "onnx":
        raise InputError(
            f"update={options.name!r} rewrites the layers of a PyTorch module one after the other, and this model is an .onnx "
            f"file. Prune the module that the file was made from, or leave the update out"
        )
    updater = _Updater(run, masks, options)
    groups = group_sites(run.captured, run.regions, updater.work())
    stages = plan_stages(groups, int(options.memory_mib * 2**20), options.passes)
    report_to = run.progress or (lambda done, total: None)
    report_to(0, len(stages))
    for index, stage in enumerate(stages):
        updater.rewrite(stage)
        report_to(index + 1, len(stages))
    return updater.masks(), updater.updates


class _Updater:
    """The model while it is rewritten.

    Attributes:
        updates: what became of the sites so far.
    """

    def __init__(self, run: PruningRun, masks: MaskSet, options: UpdateOptions) -> None:
        assert run.batches is not None  # see select_masks
        self._run, self._masks, self._options, self._batches = run, masks, options, run.batches
        self._repeated = repeated_weights(run.regions)
        self._plan = plan_padding(run.captured, run.regions, options.padding_mask)
        self._weights: dict[str, Tensor] = {}  # what the model has by now: dense where no site was reached
        self._changed = set(masks.new_values)
        self._chosen: dict[str, dict[PruneSite, Tensor]] = {}  # what sites keep that an update chose anew
        self._mask_of = lru_cache(maxsize=2)(masks.__getitem__)  # not unpacked anew for every expert of a stack
        self.updates: list[SiteUpdate] = []
        with_values(run.captured, {})  # refuses a module that cannot be copied before anything has run

    def work(self) -> list[PruneSite]:
        """The sites that lose something and keep something; those that keep nothing are zero from the start."""
        found: list[PruneSite] = []
        for fqn, sites in self._run.sites_by_fqn.items():
            if fqn not in self._masks.packed:
                continue
            kept = sites[0].layout.matrices(self._masks[fqn])
            counts = {site: int(site.matrix(kept).sum()) for site in sites}
            found += [site for site, count in counts.items() if 0 < count < site.weight_count]
            empty = [site for site, count in counts.items() if not count]
            if empty:
                self._write(fqn, {site: self._dense(fqn).new_zeros(()) for site in empty})
        return found

    def rewrite(self, stage: Sequence[SiteGroup]) -> None:
        """Run the batches through the model as it is by now, and rewrite the sites of a stage."""
        collector = GramCollector(tuple(site for group in stage for site in group.sites), self._plan, self._repeated)
        current = with_values(self._run.captured, self._weights) if self._weights else self._run.captured
        with seeded(self._run.seed, self._run.captured.module):
            run_batches(
                current, self._run.regions, collector, self._batches(), self._plan, num_samples=self._options.num_samples
            )
        done: dict[str, dict[PruneSite, Tensor]] = {}
        for group in stage:
            for site, matrix in self._rewritten(group, collector):
                done.setdefault(site.fqn, {})[site] = matrix
        for fqn, matrices in done.items():
            self._write(fqn, matrices)

    def masks(self) -> MaskSet:
        """The masks with the new values, and with what is to be said of the sites that were left alone."""
        chosen = {fqn: PackedMask.pack(self._chosen_mask(fqn)) for fqn in self._chosen}
        found = replace(self._masks, packed={**self._masks.packed, **chosen})
        values = {fqn: self._weights[fqn][found[fqn].to(self._weights[fqn].device)] for fqn in self._changed}
        ordered = {fqn: values[fqn] for fqn in found.packed if fqn in values}
        return replace(found, new_values=ordered, diagnostics=(*self._masks.diagnostics, *self._left()))

    def _chosen_mask(self, fqn: str) -> Tensor:
        """The mask of a weight of which sites keep something else than they were given."""
        mask = self._masks[fqn]
        layout = next(iter(self._chosen[fqn])).layout
        matrices = layout.matrices(mask).clone(memory_format=torch.contiguous_format)
        for site, kept in self._chosen[fqn].items():
            site.matrix(matrices).copy_(kept)
        return layout.stored(matrices, mask.shape)

    def _rewritten(self, group: SiteGroup, collector: GramCollector) -> Iterator[tuple[PruneSite, Tensor]]:
        """Every site of a group, with its matrix as it is from now on."""
        gram = collector.gram(group.sites[0])
        for site in group.sites:
            if collector.gram(site) is not gram:  # a run that differs from the captured one told them apart
                yield from self._rewritten(replace(group, sites=(site,)), collector)
        shared = [site for site in group.sites if collector.gram(site) is gram]
        solver, left = self._solver(gram)
        for site in shared:
            dense, kept, current = (self._matrix(site, self._dense(site.fqn)), self._kept(site), self._current(site))
            if solver is None:
                self.updates.append(SiteUpdate(site.name, 0.0, 0.0, left))
                yield site, torch.where(kept, current, 0.0)
                continue
            result = solver.reconstruct(dense, kept, current)
            if result.rows:
                self._changed.add(site.fqn)
            if result.kept is not None:
                self._chosen.setdefault(site.fqn, {})[site] = result.kept
            left = None if result.rows or not result.masked_error else "no row of its output comes closer to the dense one"
            self.updates.append(SiteUpdate(site.name, result.masked_error, result.error, left))
            yield site, result.weight

    def _solver(self, gram: Tensor | None) -> tuple[RowReconstructor | None, str | None]:
        """What reconstructs matrices with this input, or why nothing can."""
        refusal = refused_gram(gram)
        if gram is None or refusal is not None:
            return None, refusal
        try:
            return self._options.solver(gram, self._run.pattern), None
        except ArithmeticError as error:
            return None, str(error)

    def _dense(self, fqn: str) -> Tensor:
        return self._run.captured.parameter(fqn).detach()

    def _kept(self, site: PruneSite) -> Tensor:
        return self._matrix(site, self._mask_of(site.fqn)).to(self._dense(site.fqn).device)

    def _current(self, site: PruneSite) -> Tensor:
        """What the masks' own values make of a site, or the dense values."""
        dense = self._dense(site.fqn)
        return self._matrix(site, self._masks.updated_weight(site.fqn, dense) if site.fqn in self._masks.new_values else dense)

    @staticmethod
    def _matrix(site: PruneSite, parameter: Tensor) -> Tensor:
        """(out_features, in_features) of a site."""
        return site.matrix(site.layout.matrices(parameter))

    def _write(self, fqn: str, matrices: Mapping[PruneSite, Tensor]) -> None:
        """Put the matrices of some sites into the model's weight."""
        weight = self._weights.get(fqn)
        if weight is None:
            weight = self._dense(fqn).clone(memory_format=torch.contiguous_format)
        layout = next(iter(matrices)).layout
        whole = layout.matrices(weight)
        for site, matrix in matrices.items():
            site.matrix(whole).copy_(matrix)
        self._weights[fqn] = layout.stored(whole, weight.shape).contiguous()

    def _left(self) -> Iterator[Diagnostic]:
        """Sites whose values stay, the experts of one weight with one reason in one line."""
        experts: dict[tuple[str, str], list[int]] = {}
        sites = {site.name: site for site in self._run.regions.pruned_sites}
        for update in self.updates:
            if update.left is None:
                continue
            site = sites[update.name]
            if site.expert is None:
                yield Diagnostic(site.name, f"its kept weights are not updated: {update.left}")
            else:
                experts.setdefault((site.fqn, update.left), []).append(site.expert)
        for (fqn, reason), numbers in experts.items():
            listed = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
            count = len({site.expert for site in self._run.sites_by_fqn[fqn]})
            yield Diagnostic(fqn, f"{len(numbers)} of its {count} experts ({listed}) are not updated: {reason}")


def refused_gram(gram: Tensor | None) -> str | None:
    """Why nothing can be solved with a Gram matrix (in_features, in_features); None where it can be tried."""
    if gram is None:
        return "it received no calibration token"
    if not bool(gram.isfinite().all()):
        return "its input holds NaN or infinity"
    return None if bool(gram.diagonal().any()) else "its input is zero in every calibration token"
