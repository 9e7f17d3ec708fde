"""The space of ``prune_jointly`` over graphs that are shared, so that many searches of one model are cheap.

Removed units stay in the graph with the columns of W_out at zero: outputs, token scores (Eq. 7) and the scores of what is left
are the same, FLOPs are counted without them. A graph is made once per number of tokens, for all searches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.comp.modes import TokenMode, UnitMode, left_of
from mfcompile.comp.space import Cutting, ModelSpace, ModelState
from mfcompile.graph import CapturedGraph
from mfcompile.module_copy import with_weights
from mfcompile.passes.flops import FlopCount, count_flops
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.weight_values import with_values
from mfcompile.tokens import prune_tokens

Removed = Mapping[str, tuple[int, ...]]
Dead = Mapping[str, tuple[int, Sequence[int]]]


class TokenGraphs:
    """The dense graph with fewer tokens, each made once.

    Args:
        dense: with its program.
    """

    def __init__(self, dense: CapturedGraph) -> None:
        self.dense = dense
        self._made: dict[Any, CapturedGraph] = {}
        self._counts: dict[Any, FlopCount] = {}

    def graph(self, keep: Mapping[str, float], cutting: Cutting, dead: Dead) -> CapturedGraph:
        """The graph with these shares of tokens left.

        Args:
            keep: site -> share.
            cutting: how tokens are cut.
            dead: site -> (heads in all, numbers of those that are gone).
        """
        if not keep:
            return self.dense
        factors = {site: _factors(*dead[site]) for site in keep if site in dead and dead[site][1]}
        key = (cutting, *sorted(keep.items()), *((site, *dead[site][1]) for site in sorted(factors)))
        if key not in self._made:
            how: dict[str, Any] = {"scorer": cutting.scorer, "rest": cutting.rest, "restore": cutting.restore}
            self._made[key] = prune_tokens(self.dense, keep, head_factors=factors or None, **how)
        return self._made[key]

    def count(self, keep: Mapping[str, float], cutting: Cutting) -> FlopCount:
        """FLOPs with all units."""
        key = tuple(sorted(keep.items()))
        if key not in self._counts:
            exported = self.graph(keep, cutting, {}).exported  # heads have no say in how many tokens there are
            assert exported is not None  # programs are what is cut
            self._counts[key] = count_flops(exported.program)
        return self._counts[key]


def _factors(count: int, dead: Sequence[int]) -> Tensor:
    factors = torch.ones(count)
    factors[list(dead)] = 0
    return factors


class SharedState(ModelState):
    """A state whose graph has all units; ``flops`` are those without the removed ones."""

    space: SharedSpace

    @cached_property
    def flops(self) -> FlopCount:
        """Of what is left."""
        return self.space.count(self.removed, self.gone)

    @property
    def total(self) -> int:
        """FLOPs in all."""
        return self.flops.total

    @property
    def module(self) -> nn.Module:
        """A module that gives what the graph gives."""
        return self.captured.module if "captured" in vars(self) else self.space.module(self.removed, self.gone)


class SharedSpace(ModelSpace):
    """``ModelSpace`` over ``TokenGraphs``.

    Args:
        graphs: of the dense model.
        token_step: tokens go by multiples of this at the first site, so that few graphs are made.
        arguments, named: of ``ModelSpace`` behind ``dense``.
    """

    def __init__(self, graphs: TokenGraphs, token_step: int, *arguments: Any, **named: Any) -> None:
        super().__init__(graphs.dense, *arguments, **named)
        self._graphs, self._token_step = graphs, token_step
        self._dense = self._state({}, {})

    def count(self, removed: Removed, gone: Mapping[str, int]) -> FlopCount:
        """FLOPs of what is left: those of weights and attentions go down with the elements of their unit."""
        base = self._graphs.count(self.keep(gone), self._cutting)
        weights, modules = dict(base.by_weight), dict(base.by_module)
        for unit in self._units:
            lost = len(removed.get(unit.name, ())) / unit.count
            for fqn in unit.weights:
                if lost and fqn in weights:
                    weights[fqn] = round(weights[fqn] * (1 - lost))
            path = unit.name.partition("@")[0]
            if lost and unit.kind == "heads" and path in modules:
                modules[path] = round(modules[path] * (1 - lost))
        saved = sum(base.by_weight[fqn] - count for fqn, count in weights.items())
        saved += sum(base.by_module[path] - count for path, count in modules.items())
        return FlopCount(base.total - saved, modules, base.uncounted, weights)

    def module(self, removed: Removed, gone: Mapping[str, int]) -> nn.Module:
        """A module that computes a state."""
        return with_weights(self._cut(removed, gone).module, self._zeros(removed))

    def _state(self, removed: Removed, gone: Mapping[str, int], **known: Any) -> ModelState:
        state = SharedState(removed, gone, lambda: self._graph(removed, gone))
        state.space = self
        return state

    def _graph(self, removed: Removed, gone: Mapping[str, int]) -> CapturedGraph:
        return with_values(self._cut(removed, gone), self._zeros(removed)) if removed else self._cut(removed, gone)

    def _cut(self, removed: Removed, gone: Mapping[str, int]) -> CapturedGraph:
        dead: dict[str, tuple[int, Sequence[int]]] = {
            unit.name: (unit.count, removed.get(unit.name, ())) for unit in self._units if unit.kind == "heads"
        }
        return self._graphs.graph(self.keep(gone), self._cutting, dead)

    def _zeros(self, removed: Removed) -> dict[str, Tensor]:
        """FQN of W_out -> its values with zeros where it takes from removed elements."""
        found: dict[str, Tensor] = {}
        for unit in self._units:
            columns = [column for element in removed.get(unit.name, ()) for column in unit.columns(element)]
            if columns:
                fqn = unit.output_weight
                weight = found.get(fqn, self._graphs.dense.parameter(fqn).detach())
                found[fqn] = weight.clone()
                found[fqn][:, columns] = 0
        return found

    def _fewer_tokens(self, state: ModelState, mode: TokenMode, saving: float) -> ModelState | None:
        now, step = state.gone.get(mode.name, 0), self._token_step
        if now >= mode.most:
            return None
        most = max(now + step, self._most_now(now, mode))
        numbers = [number for number in (*range(now + step, mode.most, step), mode.most) if number <= most] or [mode.most]
        low, high = 0, len(numbers)  # numbers[:low] save no more than they may
        while low < high:
            middle = (low + high) // 2
            found = self._state(state.removed, {**state.gone, mode.name: numbers[middle]})
            is_little = self.flops(state) - self.flops(found) <= saving
            low, high = (middle + 1, high) if is_little else (low, middle)
        return self._state(state.removed, {**state.gone, mode.name: numbers[max(low - 1, 0)]})

    def _after_units(
        self, state: ModelState, mode: UnitMode, taken: Mapping[str, Sequence[int]], removed: Removed
    ) -> ModelState:
        return self._state(removed, state.gone)

    def _scores(self, state: ModelState) -> dict[str, dict[int, float]]:
        if self._scored is None or self._scored[0] is not state:
            found = self._score(state.captured, self._units)
            named = {unit.name: self._left(unit, state, found[unit.name]) for unit in self._units}
            self._scored = (state, named)
        return self._scored[1]

    def _left(self, unit: StructuralUnit, state: ModelState, scores: Tensor) -> dict[int, float]:
        relative = (scores / self._means[unit.name]).tolist()
        return {element: relative[element] for element in left_of(unit, state.removed.get(unit.name, ()))}
