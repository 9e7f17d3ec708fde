"""A model as a space of modes: units of a region and tokens of a modality that can go, what a step takes, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from mfcompile.comp.modes import TokenMode, UnitMode, left_of, smaller_unit
from mfcompile.graph import CapturedGraph
from mfcompile.module_copy import with_weights
from mfcompile.passes.flops import FlopCount, count_flops
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.token_scores import TokenScorer
from mfcompile.region import ROWS, WeightLayout
from mfcompile.structure import remove_units
from mfcompile.tokens import FewerTokens, TokenCutter

ENOUGH = 0.7
"""A step of tokens that saves this much of what it may is taken: the search goes on from wherever it is."""

MOST_TRIALS = 6
"""Graphs that one step of tokens is looked for among."""

UnitScores = Callable[[CapturedGraph, Sequence[StructuralUnit]], Mapping[str, Tensor]]
"""Takes a graph and its units, and gives unit -> (count,) scores."""


class ModelState:
    """A model on its way; its graph is made when it is asked for.

    Args:
        removed: unit -> elements that are gone, by their numbers in the dense model.
        gone: token mode -> tokens that go at its first site.
        build: makes the graph.
        total: its FLOPs, where they are known without it.
        stand_in: makes a module that gives the same outputs for less; None where there is none.
        fewer: makes the program that the graph is captured of, which counts and runs without being captured; None where
            there is none.
    """

    def __init__(
        self,
        removed: Mapping[str, tuple[int, ...]],
        gone: Mapping[str, int],
        build: Callable[[], CapturedGraph],
        total: int | None = None,
        stand_in: Callable[[], nn.Module] | None = None,
        fewer: Callable[[], FewerTokens] | None = None,
    ) -> None:
        self.removed, self.gone = removed, gone
        self._build, self._total, self._stand_in, self._make_fewer = build, total, stand_in, fewer

    @cached_property
    def captured(self) -> CapturedGraph:
        """The graph that is left."""
        return self._build() if self._fewer is None else self._fewer.captured

    @cached_property
    def _fewer(self) -> FewerTokens | None:
        return None if self._make_fewer is None else self._make_fewer()

    @cached_property
    def flops(self) -> FlopCount:
        """Of the graph, for inputs of the sizes of the example."""
        exported = self.captured.exported if self._fewer is None else self._fewer.exported
        assert exported is not None  # programs are what is cut
        return count_flops(exported.program)

    @property
    def total(self) -> int:
        """FLOPs in all."""
        return self.flops.total if self._total is None or self._is_made else self._total

    @property
    def module(self) -> nn.Module:
        """A module that gives what the graph gives."""
        if self._stand_in is not None and not self._is_made:
            return self._stand_in()
        return self.captured.module if self._fewer is None else self._fewer.module

    @property
    def _is_made(self) -> bool:
        return "captured" in vars(self)


@dataclass(frozen=True)
class Cutting:
    """How tokens are cut; see ``mfcompile.prune_tokens``."""

    scorer: str | TokenScorer = "cit"
    rest: str = "drop"
    restore: str = "zeros"


class ModelSpace:
    """What ``search_modes`` searches: graphs of a model with fewer units and tokens.

    Every state is made from the dense graph: units first, which the scores of tokens then know nothing of (Eq. 7 of CoMP holds
    by construction), then tokens. Nothing of the dense graph is changed.

    Args:
        dense: with its program.
        modes: what may go.
        score: gives the scores of the units of a graph.
        measure: says how much worse than dense a module is.
        spend: what a graph spends, as a share of the dense one's; None for its FLOPs.
        cutting: how tokens are cut.
        modalities: as in ``prune_tokens``.
        layouts: FQN of an output weight -> its layout, where it is not (out_features, in_features).
        mode_step: at most this share of what a mode has left goes in one step.
    """

    def __init__(
        self,
        dense: CapturedGraph,
        modes: Sequence[UnitMode | TokenMode],
        score: UnitScores,
        measure: Callable[[nn.Module], float],
        spend: Callable[[CapturedGraph], float] | None = None,
        cutting: Cutting | None = None,
        modalities: Mapping[str, str] | None = None,
        layouts: Mapping[str, WeightLayout] | None = None,
        mode_step: float = 1.0,
    ) -> None:
        self.by_name = {mode.name: mode for mode in modes}
        self._score, self._measure, self._spend = score, measure, spend
        self._cutting, self._modalities = cutting or Cutting(), modalities
        self._layouts = layouts or {}
        self._mode_step = mode_step
        self._dense = ModelState({}, {}, lambda: dense)
        self._slopes: dict[str, float] = {}
        self._scored: tuple[ModelState, dict[str, dict[int, float]]] | None = None
        self._fewer_units: tuple[Mapping[str, tuple[int, ...]], CapturedGraph] = ({}, dense)
        self._cutter: tuple[CapturedGraph, TokenCutter] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the modes."""
        return tuple(self.by_name)

    def start(self) -> ModelState:
        """The dense model."""
        return self._dense

    def flops(self, state: ModelState) -> float:
        """Share of the dense FLOPs."""
        return state.total / self._dense.total

    def settle(self, state: ModelState) -> ModelState:
        """The state with its graph made."""
        assert state.captured is not None  # made by being asked for
        return state

    def measure(self, state: ModelState) -> tuple[float, float]:
        """Loss against the dense model, and what the state spends."""
        loss = self._measure(state.module)
        return loss, self.flops(state) if self._spend is None else self._spend(state.captured)

    def changes(self, before: ModelState, after: ModelState) -> dict[str, Any]:
        """Unit -> elements that went; site -> tokens that are left of those that arrive."""
        units = {name: len(gone) - len(before.removed.get(name, ())) for name, gone in after.removed.items()}
        tokens = {name: gone - before.gone.get(name, 0) for name, gone in after.gone.items()}
        return {name: count for name, count in {**units, **tokens}.items() if count}

    def step(self, state: ModelState, mode: str, saving: float) -> ModelState | None:
        """See ``ModeSpace.step``."""
        chosen = self.by_name[mode]
        if isinstance(chosen, TokenMode):
            return self._fewer_tokens(state, chosen, saving)
        return self._smaller_units(state, chosen, saving)

    def least(self) -> ModelState:
        """The state with all modes at their caps, by whatever elements: the fewest FLOPs that can be reached."""
        units = [mode for mode in self.by_name.values() if isinstance(mode, UnitMode)]
        removed = {unit.name: tuple(range(mode.most(unit))) for mode in units for unit in mode.units if mode.most(unit)}
        gone = {mode.name: mode.most for mode in self.by_name.values() if isinstance(mode, TokenMode) and mode.most}
        return self._state(removed, gone)

    def keep(self, gone: Mapping[str, int]) -> dict[str, float]:
        """Token site -> the share of arriving unprotected tokens that stays."""
        return {site: share for name, count in gone.items() for site, share in self._token_mode(name).keep(count).items()}

    def _token_mode(self, name: str) -> TokenMode:
        mode = self.by_name[name]
        assert isinstance(mode, TokenMode)  # only of these do tokens go
        return mode

    def _with_fewer_tokens(self, removed: Mapping[str, tuple[int, ...]], keep: Mapping[str, float]) -> FewerTokens:
        """The dense graph without some units, with some of its tokens; its sites are found once for all that follow."""
        graph, how = self._without(removed), self._cutting
        if self._cutter is None or self._cutter[0] is not graph:
            self._cutter = (graph, TokenCutter(graph, modalities=self._modalities))
        return self._cutter[1].cut(keep, scorer=how.scorer, rest=how.rest, restore=how.restore)

    def _state(self, removed: Mapping[str, tuple[int, ...]], gone: Mapping[str, int], **known: Any) -> ModelState:
        keep = self.keep(gone)
        fewer = (lambda: self._with_fewer_tokens(removed, keep)) if keep else None
        return ModelState(removed, gone, lambda: self._without(removed), fewer=fewer, **known)

    def _without(self, removed: Mapping[str, tuple[int, ...]]) -> CapturedGraph:
        """The dense graph without some units; the last one is kept, for states that differ in tokens alone."""
        if removed != self._fewer_units[0]:
            self._fewer_units = (removed, remove_units(self._dense.captured, removed) if removed else self._dense.captured)
        return self._fewer_units[1]

    def _fewer_tokens(self, state: ModelState, mode: TokenMode, saving: float) -> ModelState | None:
        """Fewer tokens at the sites of a mode: as many as the saving allows, by a secant on the FLOPs that are counted."""
        now = state.gone.get(mode.name, 0)
        if now >= mode.most:
            return None
        slope = self._slopes.get(mode.name) or self.flops(state) / mode.free
        best: ModelState | None = None
        low, high = now, self._most_now(now, mode) + 1
        for _ in range(MOST_TRIALS):
            trial = min(max(now + int(saving / slope), low + 1), high - 1)
            found = self._state(state.removed, {**state.gone, mode.name: trial})
            saved = self.flops(state) - self.flops(found)
            slope = self._slopes[mode.name] = max(saved / (trial - now), 1e-9)
            if saved <= saving or trial == now + 1:
                best = found
            if saved <= saving:
                low = trial
            else:
                high = trial
            if high - low <= 1 or ENOUGH * saving <= saved <= saving:
                break
        return best if best is not None else self._state(state.removed, {**state.gone, mode.name: now + 1})

    def _most_now(self, now: int, mode: TokenMode) -> int:
        """Tokens that may be gone after one more step."""
        return now + max(1, int(self._mode_step * (mode.most - now)))

    def _smaller_units(self, state: ModelState, mode: UnitMode, saving: float) -> ModelState | None:
        """Without the elements that score least, as many as the saving allows."""
        taken = self._cheapest(state, mode, saving)
        if not taken:
            return None
        removed = {**state.removed}
        for name, elements in taken.items():
            removed[name] = tuple(sorted((*removed.get(name, ()), *elements)))
        return self._after_units(state, mode, taken, removed)

    def _after_units(
        self, state: ModelState, mode: UnitMode, taken: Mapping[str, Sequence[int]], removed: Mapping[str, tuple[int, ...]]
    ) -> ModelState:
        """The state without elements that were taken from a mode; its graph is put off where something stands in for it."""
        price = {unit.name: self._price(state, unit) for unit in mode.units}
        saved = sum(price[name] * len(elements) for name, elements in taken.items())
        cut_behind = {site.name for name in state.gone for site in self._token_mode(name).sites}
        if cut_behind & taken.keys():
            return self._state(removed, state.gone)  # heads that are gone have no say in which tokens stay
        total = state.total - round(saved * self._dense.total)
        return self._state(removed, state.gone, total=total, stand_in=lambda: self._zeroed(state, mode, taken))

    def _zeroed(self, state: ModelState, mode: UnitMode, taken: Mapping[str, Sequence[int]]) -> nn.Module:
        """The module of a state with what W_out takes from some elements set to zero: the outputs are those without them."""
        captured = state.captured
        zeroed: dict[str, Tensor] = {}
        for unit in mode.units:
            if unit.name in taken:
                left = left_of(unit, state.removed.get(unit.name, ()))
                own = smaller_unit(unit, left)
                columns = [column for element in taken[unit.name] for column in own.columns(left.index(element))]
                fqn, layout = unit.output_weight, self._layouts.get(unit.output_weight, ROWS)
                weight = zeroed.get(fqn, captured.parameter(fqn).detach())
                matrices = layout.matrices(weight).clone()
                matrices[:, :, columns] = 0
                zeroed[fqn] = layout.stored(matrices, weight.shape)
        return with_weights(captured.module, zeroed)

    def _cheapest(self, state: ModelState, mode: UnitMode, saving: float) -> dict[str, list[int]]:
        price = {unit.name: self._price(state, unit) for unit in mode.units}
        left = {unit.name: mode.most(unit) - len(state.removed.get(unit.name, ())) for unit in mode.units}
        saving = min(saving, self._mode_step * sum(price[name] * count for name, count in left.items()))
        scores = self._scores(state)
        ranked = sorted(
            (score, place, element, unit.name)  # one threshold per mode (Eq. 1); per FLOP, heads would go long before channels
            for place, unit in enumerate(mode.units)
            if left[unit.name] > 0
            for element, score in scores[unit.name].items()
        )
        taken: dict[str, list[int]] = {}
        spent = 0.0
        least = min((price[name] for _, _, _, name in ranked), default=0.0)
        for _, _, element, name in ranked:
            fits = spent + price[name] <= saving or (not taken and price[name] == least > saving)
            if left[name] and fits:
                taken.setdefault(name, []).append(element)
                left[name] -= 1
                spent += price[name]
        return taken

    def _price(self, state: ModelState, unit: StructuralUnit) -> float:
        """FLOPs that one element of a unit takes in a state, as a share of the dense model's."""
        left = unit.count - len(state.removed.get(unit.name, ()))
        products = sum(state.flops.by_weight.get(fqn, 0) for fqn in unit.weights)
        if unit.kind == "heads":
            products += state.flops.by_module.get(unit.name.partition("@")[0], 0)
        return max(products, 1) / left / self._dense.total

    def _scores(self, state: ModelState) -> dict[str, dict[int, float]]:
        """Unit -> element -> score, of what is left in a state; relative to the mean of the dense unit."""
        if self._scored is None or self._scored[0] is not state:
            left = {unit.name: left_of(unit, state.removed.get(unit.name, ())) for unit in self._units}
            found = self._score(state.captured, [smaller_unit(unit, left[unit.name]) for unit in self._units])
            named = {
                name: dict(zip(left[name], (scores / self._means[name]).tolist(), strict=True))
                for name, scores in found.items()
            }
            self._scored = (state, named)
        return self._scored[1]

    @cached_property
    def _means(self) -> dict[str, float]:
        found = self._score(self._dense.captured, self._units)
        return {name: float(scores.mean()) or 1.0 for name, scores in found.items()}

    @cached_property
    def _units(self) -> tuple[StructuralUnit, ...]:
        return tuple(unit for mode in self.by_name.values() if isinstance(mode, UnitMode) for unit in mode.units)
