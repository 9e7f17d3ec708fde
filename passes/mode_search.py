"""Which mode to prune next: the multi-mode pruning strategy (MPS) of CoMP (CVPR 2026), and what it is compared with.

A mode is a kind of thing that can go (parameters of a region, tokens of a modality). A search takes one step of one mode per
stage, until the model is as small as was asked for. Nothing here knows of a model: what a step is, and what it costs, is
asked of a ``ModeSpace``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from mfcompile.errors import InputError

S = TypeVar("S")

STRATEGIES = ("probe", "comp", "fixed", "greedy")
"""How the mode of a stage is chosen: "probe" tries a step of every mode and takes the cheapest; "comp" is Eq. 8 to 10; "fixed"
goes round in a given order; "greedy" is Eq. 8 alone (neither exploration nor history)."""

RESOLUTION = 1e-3
"""A step that saves less of the dense model than this counts as one that saves this much: seconds are measured with noise, and
a saving may come out as nothing or less."""


@dataclass(frozen=True)
class SearchOptions:
    """How modes are chosen. The numbers with a symbol are those of the paper.

    Attributes:
        strategy: one of ``STRATEGIES``.
        step: FLOPs that one stage is to save, as a share of the dense model's.
        exploration: rho, the chance of a stage to explore.
        temperature: tau of the softmax that exploration draws from.
        memory: lambda_0, the weight of the last cost of a mode that was visited in the stage before.
        horizon: I_max, stages after which an old cost is forgotten.
        tolerance: how far from the target the end may be, as a share of the target.
        order: modes in the order of "fixed" and of first visits; None for the order in which the space has them.
        seed: of exploration.
    """

    strategy: str = "probe"
    step: float = 0.05
    exploration: float = 0.2
    temperature: float = 5.0
    memory: float = 0.4
    horizon: int = 5
    tolerance: float = 0.01
    order: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = {
            f"strategy={self.strategy!r} is none of {', '.join(STRATEGIES)}": self.strategy in STRATEGIES,
            f"step={self.step!r} is not in (0, 1): it is the share of the dense FLOPs that a stage saves": 0 < self.step < 1,
            f"exploration={self.exploration!r} is not in [0, 1]": 0 <= self.exploration <= 1,
            f"temperature={self.temperature!r} is not above 0": self.temperature > 0,
            f"memory={self.memory!r} is not in [0, 1]": 0 <= self.memory <= 1,
            f"horizon={self.horizon!r} is not at least 1": self.horizon >= 1,
            f"tolerance={self.tolerance!r} is not in [0, 1)": 0 <= self.tolerance < 1,
        }
        wrong = next((problem for problem, is_met in problems.items() if not is_met), None)
        if wrong is not None:
            raise InputError(wrong)


def memory_weight(idle: int, memory: float = 0.4, horizon: int = 5) -> float:
    """lambda of Eq. 10: what the last cost of a mode still weighs, max(lambda_0 - lambda_0 / I_max (I_m - 1), 0).

    Args:
        idle: I_m, stages since the mode was visited.
        memory: lambda_0.
        horizon: I_max.
    """
    return max(memory - memory / horizon * (idle - 1), 0.0)


def updated_cost(before: float | None, observed: float, idle: int, memory: float = 0.4, horizon: int = 5) -> float:
    """R_m after a visit (Eq. 10): lambda R_m + (1 - lambda) r; r where the mode was never visited.

    Args:
        before: R_m; None before the first visit.
        observed: r of the step that was taken.
        idle: I_m at this visit.
        memory: lambda_0.
        horizon: I_max.
    """
    weight = memory_weight(idle, memory, horizon)
    return observed if before is None or weight == 0 else weight * before + (1 - weight) * observed


def exploration_chances(idle: Mapping[str, int], temperature: float = 5.0) -> dict[str, float]:
    """The chance of each mode when a stage explores (Eq. 9): softmax(I_m / tau), so that neglected modes come first.

    Args:
        idle: mode -> I_m.
        temperature: tau.
    """
    most = max(idle.values())  # the largest exponent is 0
    weights = {mode: math.exp((stages - most) / temperature) for mode, stages in idle.items()}
    total = sum(weights.values())
    return {mode: weight / total for mode, weight in weights.items()}


class ModePolicy:
    """Chooses the mode of every stage, and remembers what modes cost.

    Attributes:
        open: modes that can go on, in order.
        costs: mode -> R_m, of the modes that were visited.
        stage: T, the stages that were recorded.
    """

    def __init__(self, modes: Sequence[str], options: SearchOptions) -> None:
        self.open = list(_ordered(modes, options.order))
        self.costs: dict[str, float] = {}
        self.stage = 0
        self._options = options
        self._last = dict.fromkeys(self.open, 0)
        self._random = random.Random(options.seed)
        self._cycle = tuple(self.open)
        self._place = 0

    def propose(self) -> tuple[tuple[str, ...], str]:
        """The modes of which a step is to be tried now, and why: all of them where a search probes, else one."""
        if self._options.strategy == "probe":
            return tuple(self.open), "cheapest of all"
        if self._options.strategy == "fixed":
            order = self._cycle[self._place :] + self._cycle[: self._place]
            return (next(mode for mode in order if mode in self.open),), "its turn"
        unknown = [mode for mode in self.open if mode not in self.costs]
        if unknown:
            return (unknown[0],), "first visit"
        if self._options.strategy == "comp" and self._random.random() < self._options.exploration:
            chances = exploration_chances(self.idle(), self._options.temperature)
            return (self._random.choices(list(chances), list(chances.values()))[0],), "explored"
        return (self.by_cost()[0],), "cheapest so far"

    def idle(self) -> dict[str, int]:
        """Open mode -> I_m, how many stages before the one to come it was visited."""
        return {mode: self.stage + 1 - self._last[mode] for mode in self.open}

    def by_cost(self) -> list[str]:
        """Open modes, the cheapest first; those without a cost behind them."""
        return sorted(self.open, key=lambda mode: self.costs.get(mode, math.inf))

    def record(self, mode: str, costs: Mapping[str, float]) -> None:
        """A stage was taken.

        Args:
            mode: whose step was taken.
            costs: mode -> r, of all whose step was tried.

        Raises:
            InputError: a cost is NaN.
        """
        broken = next((tried for tried, cost in costs.items() if math.isnan(cost)), None)
        if broken is not None:
            raise InputError(
                f"a step of the mode {broken!r} has the cost NaN: the model, or the evaluation, gives NaN. Look at what is "
                f"computed with its units or tokens gone, or leave the mode out"
            )
        has_memory = self._options.strategy == "comp"
        for tried, cost in costs.items():
            memory = self._options.memory if has_memory else 0.0
            idle = self.stage + 1 - self._last[tried]
            self.costs[tried] = updated_cost(self.costs.get(tried), cost, idle, memory, self._options.horizon)
        self.stage += 1
        self._last[mode] = self.stage
        self._place = (self._cycle.index(mode) + 1) % len(self._cycle)

    def close(self, mode: str) -> None:
        """The mode can go no further."""
        self.open.remove(mode)


def _ordered(modes: Sequence[str], order: Sequence[str] | None) -> Iterable[str]:
    """Modes as the order has them.

    Raises:
        InputError: it names another set of modes.
    """
    if not modes:
        raise InputError("there is no mode to search over: nothing of the model can be pruned by units or tokens")
    if order is None:
        return modes
    if sorted(order) != sorted(modes):
        raise InputError(f"order={tuple(order)!r} must name every mode once; the modes are {', '.join(modes)}")
    return order


class ModeSpace(Protocol[S]):
    """What a search prunes: states of a model, and steps between them.

    FLOPs and spending are shares of the dense model's.
    """

    @property
    def modes(self) -> Sequence[str]:
        """Names of the modes."""
        ...

    def start(self) -> S:
        """Where the search begins."""
        ...

    def flops(self, state: S) -> float:
        """FLOPs that are left; exact."""
        ...

    def step(self, state: S, mode: str, saving: float) -> S | None:
        """The state after a step that saves as much as it can of ``saving``, but at least one unit; None at the mode's cap."""
        ...

    def measure(self, state: S) -> tuple[float, float]:
        """How much worse than the dense model a state is, and what it spends (FLOPs, or seconds)."""
        ...

    def settle(self, state: S) -> S:
        """The state as it is once its step was taken: what was put off while it was one of several is done."""
        ...

    def changes(self, before: S, after: S) -> Mapping[str, Any]:
        """What a step took, as plain values for a report."""
        ...


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        stage: from 1.
        mode: whose step was taken.
        why: how it was chosen.
        flops: FLOPs left after it, as a share of the dense model's.
        loss: how much worse than dense the model is after it.
        spent: what it spends after it, as a share of the dense model's: FLOPs, or seconds.
        cost: r of Eq. 8, loss that was added per share that was saved; the smaller the better.
        costs: mode -> R_m after the stage.
        tried: mode -> r, of all whose step was tried.
        changes: what was taken.
    """

    stage: int
    mode: str
    why: str
    flops: float
    loss: float
    spent: float
    cost: float
    costs: Mapping[str, float]
    tried: Mapping[str, float]
    changes: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SearchResult(Generic[S]):
    """Where a search ended.

    Attributes:
        state: the last state.
        stages: every stage, in order.
        capped: modes that could go no further, in the order in which they were found so.
    """

    state: S
    stages: tuple[Stage, ...]
    capped: tuple[str, ...] = ()


def search_modes(
    space: ModeSpace[S],
    target: float,
    options: SearchOptions | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> SearchResult[S]:
    """Take steps of one mode each until the FLOPs are at the target.

    The last step is a partial one: the search ends within the tolerance of the target or, where no open mode has a unit that
    small, as near to it as one unit more or less brings it.

    Args:
        space: what is pruned.
        target: FLOPs to reach, as a share of the dense model's.
        options: how modes are chosen.
        progress: called with (thousandths of the dense FLOPs saved, thousandths to save).

    Raises:
        InputError: the target is no share, or all modes are at their caps above it.
    """
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target <= 1:
        raise InputError(
            f"flops={target!r} is not in (0, 1]: it is the share of the dense model's FLOPs that stays, such as 0.5"
        )
    search = _Search(space, float(target), options or SearchOptions())
    while search.is_above() and search.advance():
        if progress is not None:
            progress(round(1000 * (1 - search.left)), round(1000 * (1 - target)))
    return SearchResult(search.state, tuple(search.stages), tuple(search.capped))


@dataclass
class _Search(Generic[S]):
    """A search on its way."""

    space: ModeSpace[S]
    target: float
    options: SearchOptions
    stages: list[Stage] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = ModePolicy(self.space.modes, self.options)
        self.state = self.space.start()
        self.left = self.space.flops(self.state)
        self.measured = self.space.measure(self.state) if self.is_above() else (0.0, self.left)

    def is_above(self) -> bool:
        """There is more to prune."""
        return self.left > self.target * (1 + self.options.tolerance)

    def advance(self) -> bool:
        """Take one stage; False where any step would lead further from the target."""
        states, why = self._candidates()
        if not self._land(states):
            why = self._nearest(states)
            if not states:
                return False
        measured = {mode: self.space.measure(state) for mode, state in states.items()}
        tried = {mode: self._cost(*found) for mode, found in measured.items()}
        mode = min(tried, key=lambda name: (tried[name], self.policy.open.index(name)))
        changes = self.space.changes(self.state, states[mode])
        self.policy.record(mode, tried)
        self.state, self.measured = self.space.settle(states[mode]), measured[mode]
        self.left = self.space.flops(self.state)
        loss, spent = self.measured
        costs = dict(self.policy.costs)
        self.stages.append(Stage(self.policy.stage, mode, why, self.left, loss, spent, tried[mode], costs, tried, changes))
        return True

    def _candidates(self) -> tuple[dict[str, S], str]:
        """Mode -> the state after its step, of the modes that are proposed and not at their caps."""
        asked = min(self.options.step, self.left - self.target)
        while self.policy.open:
            modes, why = self.policy.propose()
            states = {mode: state for mode in modes if (state := self._step(mode, asked)) is not None}
            if states:
                return states, why
        raise InputError(
            f"flops={self.target:g} cannot be reached: all modes are at their caps with {self.left:.3f} of the FLOPs left. Ask "
            f"for more, or allow more modes"
        )

    def _step(self, mode: str, asked: float) -> S | None:
        state = self.space.step(self.state, mode, asked)
        if state is None:
            self.policy.close(mode)
            self.capped.append(mode)
        return state

    def _land(self, states: dict[str, S]) -> bool:
        """Leave out what goes below the target by more than the tolerance, where something does not."""
        lowest = self.target * (1 - self.options.tolerance)
        if all(self.space.flops(state) < lowest for state in states.values()):
            return False
        for mode in [mode for mode, state in states.items() if self.space.flops(state) < lowest]:
            del states[mode]
        return True

    def _nearest(self, states: dict[str, S]) -> str:
        """Every step that was proposed overshoots: take one of another mode that does not, or the nearest, or none."""
        for mode in [mode for mode in self.policy.by_cost() if mode not in states]:
            state = self._step(mode, self.left - self.target)
            if state is None:
                continue
            other = {mode: state}
            if self._land(other):
                states.clear()
                states.update(other)
                return "its units are small enough to land"
            states[mode] = state
        nearest = max(states, key=lambda mode: self.space.flops(states[mode]))
        is_nearer = self.target - self.space.flops(states[nearest]) < self.left - self.target
        for mode in [mode for mode in states if mode != nearest or not is_nearer]:
            del states[mode]
        return "nearest to the target, by one unit"

    def _cost(self, loss: float, spent: float) -> float:
        """r of Eq. 8: loss that is added per share that is saved."""
        return (loss - self.measured[0]) / max(self.measured[1] - spent, RESOLUTION)
