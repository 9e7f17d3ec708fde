"""Which mode is pruned next: Eq. 8 to 10 of CoMP by hand, and searches over a space that is plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mfcompile.errors import InputError
from mfcompile.passes.mode_search import (
    STRATEGIES,
    ModePolicy,
    SearchOptions,
    exploration_chances,
    memory_weight,
    search_modes,
    updated_cost,
)

State = dict[str, int]


@dataclass
class Units:
    """Modes with units of a size each; a unit of a mode costs the same, or more the more are gone.

    Attributes:
        size: mode -> FLOPs of one unit, as a share of the dense model's.
        price: mode -> loss per share that is saved, at first.
        cap: mode -> units that can go.
        growth: factor on the price, per unit that is gone already.
    """

    size: Mapping[str, float]
    price: Mapping[str, float]
    cap: Mapping[str, int]
    growth: float = 1.0
    measured: int = field(default=0, init=False)

    @property
    def modes(self) -> Sequence[str]:
        return tuple(self.size)

    def start(self) -> State:
        return dict.fromkeys(self.size, 0)

    def flops(self, state: State) -> float:
        return 1 - sum(self.size[mode] * gone for mode, gone in state.items())

    def step(self, state: State, mode: str, saving: float) -> State | None:
        possible = self.cap[mode] - state[mode]
        taken = min(possible, max(1, int(saving / self.size[mode] + 1e-9)))
        return state | {mode: state[mode] + taken} if possible else None

    def measure(self, state: State) -> tuple[float, float]:
        self.measured += 1
        loss = 0.0
        for mode, gone in state.items():
            loss += sum(self.size[mode] * self.price[mode] * self.growth**unit for unit in range(gone))
        return loss, self.flops(state)

    def settle(self, state: State) -> State:
        return state

    def changes(self, before: State, after: State) -> Mapping[str, Any]:
        return {mode: after[mode] - gone for mode, gone in before.items() if after[mode] != gone}


def three_modes(**prices: float) -> Units:
    prices = prices or {"a": 3.0, "b": 1.0, "c": 2.0}
    return Units(dict.fromkeys(prices, 0.01), prices, dict.fromkeys(prices, 90))


def modes_of(strategy: str, space: Units, target: float = 0.5, **options: Any) -> list[str]:
    return [stage.mode for stage in search_modes(space, target, SearchOptions(strategy=strategy, **options)).stages]


def test_memory_fades_from_stage_to_stage() -> None:
    assert [memory_weight(idle) for idle in range(1, 8)] == pytest.approx([0.4, 0.32, 0.24, 0.16, 0.08, 0, 0])


def test_costs_are_updated_as_equation_10_says() -> None:
    by_hand = {1: 0.4 * 10 + 0.6 * 1, 2: 0.32 * 10 + 0.68 * 1, 3: 0.24 * 10 + 0.76 * 1, 4: 0.16 * 10 + 0.84 * 1}
    by_hand |= {5: 0.08 * 10 + 0.92 * 1, 6: 1.0, 7: 1.0}
    for idle, expected in by_hand.items():
        assert updated_cost(10.0, 1.0, idle) == pytest.approx(expected)
    assert updated_cost(None, 1.0, 1) == 1.0
    assert updated_cost(math.inf, 1.0, 6) == 1.0  # forgotten, and not a product of nothing and infinity


def test_the_policy_counts_stages_since_a_mode_was_visited() -> None:
    policy = ModePolicy(["a", "b"], SearchOptions(strategy="comp", exploration=0))
    policy.record("a", {"a": 10.0})
    for _ in range(3):
        policy.record("b", {"b": 20.0})
    assert policy.idle() == {"a": 4, "b": 1}
    policy.record("a", {"a": 1.0})
    assert policy.costs["a"] == pytest.approx(0.16 * 10 + 0.84 * 1)  # I = 4
    policy.record("a", {"a": 1.0})
    assert policy.costs["a"] == pytest.approx(0.4 * 2.44 + 0.6 * 1)  # I = 1


def test_greed_takes_the_cheapest_mode_after_one_look_at_each() -> None:
    chosen = modes_of("greedy", three_modes())
    assert chosen[:3] == ["a", "b", "c"]
    assert set(chosen[3:]) == {"b"}
    without_exploring = modes_of("comp", three_modes(), exploration=0.0)
    assert set(without_exploring[3:]) == {"b"}


def test_greed_forgets_and_comp_remembers() -> None:
    space = three_modes(a=1.0, b=1.2)
    space.growth = 1.05
    greedy, comp = (search_modes(space, 0.6, SearchOptions(strategy=name, exploration=0)) for name in ("greedy", "comp"))
    for stage in greedy.stages:
        assert stage.costs[stage.mode] == stage.cost
    again = [stage for number, stage in enumerate(comp.stages) if stage.mode in {s.mode for s in comp.stages[:number]}]
    assert again
    assert all(stage.costs[stage.mode] < stage.cost for stage in again)  # prices rise, and what was cheaper is remembered


def test_a_search_that_probes_takes_the_best_step_of_every_stage() -> None:
    space = three_modes(a=3.0, b=1.0, c=2.0)
    space.growth = 1.03
    result = search_modes(space, 0.4, SearchOptions(strategy="probe"))
    for stage in result.stages:
        assert set(stage.tried) == {"a", "b", "c"}
        assert stage.cost == min(stage.tried.values())
    assert [stage.mode for stage in result.stages[:4]] == ["b"] * 4  # no first visits are wasted
    assert {stage.mode for stage in result.stages} == {"a", "b", "c"}  # prices rise until the others are as dear


def test_a_fixed_order_goes_round() -> None:
    assert modes_of("fixed", three_modes(), 0.6)[:7] == ["a", "b", "c", "a", "b", "c", "a"]
    assert modes_of("fixed", three_modes(), 0.7, order=("c", "a", "b"))[:4] == ["c", "a", "b", "c"]


def test_one_mode_is_a_search_too() -> None:
    for strategy in STRATEGIES:
        assert set(modes_of(strategy, three_modes(only=1.0), 0.6)) == {"only"}


def test_chances_are_a_softmax_of_idle_stages() -> None:
    idle = {"a": 1, "b": 6, "c": 11}
    powers = {mode: math.exp(stages / 5) for mode, stages in idle.items()}
    total = sum(powers.values())
    assert exploration_chances(idle) == pytest.approx({mode: power / total for mode, power in powers.items()})
    assert sum(exploration_chances({"a": 10**6, "b": 1}).values()) == pytest.approx(1)  # no overflow


def test_exploration_draws_by_these_chances() -> None:
    drawn: Counter[str] = Counter()
    draws = 4000
    for seed in range(draws):
        policy = ModePolicy(["a", "b", "c"], SearchOptions(strategy="comp", exploration=1.0, seed=seed))
        for mode in ("a", "a", "a", "b", "b", "c"):
            policy.record(mode, {mode: 1.0})
        modes, why = policy.propose()
        assert why == "explored"
        drawn[modes[0]] += 1
    powers = {"a": math.exp(4 / 5), "b": math.exp(2 / 5), "c": math.exp(1 / 5)}
    for mode, power in powers.items():
        chance = power / sum(powers.values())
        deviation = math.sqrt(draws * chance * (1 - chance))
        assert abs(drawn[mode] - draws * chance) < 4 * deviation


def test_a_share_of_the_stages_explores() -> None:
    policy = ModePolicy(["a", "b"], SearchOptions(strategy="comp", exploration=0.2))
    for mode in ("a", "b"):
        policy.record(mode, {mode: 1.0})
    explored = sum(policy.propose()[1] == "explored" for _ in range(2000))
    assert abs(explored - 400) < 4 * math.sqrt(2000 * 0.2 * 0.8)


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    first, again, other = (modes_of("comp", three_modes(), 0.2, exploration=0.5, seed=seed, step=0.02) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.tuples(st.floats(0.0005, 0.2), st.floats(0.1, 5)), min_size=1, max_size=4),
    st.floats(0.2, 0.95),
    st.integers(0, 3),
)
def test_a_search_ends_at_the_target_or_as_near_as_a_unit_brings_it(
    strategy: str, units: list[tuple[float, float]], target: float, seed: int
) -> None:
    names = [f"mode {number}" for number in range(len(units))]
    size = {name: unit[0] for name, unit in zip(names, units, strict=True)}
    price = {name: unit[1] for name, unit in zip(names, units, strict=True)}
    cap = {name: int(0.99 / size[name]) for name in names}
    assume(1 - sum(size[name] * cap[name] for name in names) <= target)  # what is below all caps is refused
    space = Units(size, price, cap)
    result = search_modes(space, target, SearchOptions(strategy=strategy, seed=seed))
    left = space.flops(result.state)
    open_ = [size[name] for name in names if name not in result.capped]
    assert abs(left - target) <= max(0.01 * target, min(open_, default=1.0) / 2) + 1e-9
    assert [stage.flops for stage in result.stages] == sorted((stage.flops for stage in result.stages), reverse=True)


def test_the_last_step_is_a_partial_one() -> None:
    space = Units({"fine": 0.001}, {"fine": 1.0}, {"fine": 1000})
    result = search_modes(space, 0.62, SearchOptions(step=0.05))
    assert [stage.changes["fine"] for stage in result.stages] == [50] * 7 + [30]
    assert space.flops(result.state) == pytest.approx(0.62)


def test_a_mode_with_finer_units_lands_where_the_cheapest_would_overshoot() -> None:
    space = Units({"coarse": 0.3, "fine": 0.01}, {"coarse": 0.1, "fine": 5.0}, {"coarse": 3, "fine": 90})
    result = search_modes(space, 0.6)
    assert result.stages[0].mode == "coarse"
    assert {stage.mode for stage in result.stages[1:]} == {"fine"}
    assert space.flops(result.state) == pytest.approx(0.6)


def test_a_search_stops_above_the_target_where_a_unit_leads_further_away() -> None:
    space = Units({"coarse": 0.3}, {"coarse": 1.0}, {"coarse": 3})
    assert space.flops(search_modes(space, 0.65).state) == pytest.approx(0.7)
    assert space.flops(search_modes(space, 0.5).state) == pytest.approx(0.4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_modes_at_their_caps_leave(strategy: str) -> None:
    space = Units(dict.fromkeys("ab", 0.01), {"a": 1.0, "b": 2.0}, {"a": 10, "b": 60})
    result = search_modes(space, 0.5, SearchOptions(strategy=strategy))
    assert result.capped == ("a",)
    assert result.state == {"a": 10, "b": 40}


def test_an_unreachable_target_is_refused() -> None:
    space = Units(dict.fromkeys("ab", 0.01), {"a": 1.0, "b": 2.0}, {"a": 10, "b": 10})
    with pytest.raises(InputError, match=r"flops=0\.5 cannot be reached: all modes are at their caps with 0\.800 of the FLOPs"):
        search_modes(space, 0.5)


def test_nothing_is_measured_where_nothing_is_asked() -> None:
    space = three_modes()
    assert search_modes(space, 1.0).stages == ()
    assert space.measured == 0


def test_time_that_does_not_fall_costs_much_and_not_infinitely_much() -> None:
    class Slow(Units):
        def measure(self, state: State) -> tuple[float, float]:
            return super().measure(state)[0], 1.0 - 0.005 * state["b"]

    space = Slow(dict.fromkeys("ab", 0.01), {"a": 1.0, "b": 2.0}, {"a": 90, "b": 90})
    result = search_modes(space, 0.7)
    assert {stage.mode for stage in result.stages} == {"b"}  # "a" loses less per FLOP, and saves no time at all
    assert result.stages[0].tried == pytest.approx({"a": 0.05 / 0.001, "b": 0.1 / 0.025})


def test_a_cost_that_is_nan_names_its_mode() -> None:
    with pytest.raises(InputError, match="the mode 'a' has the cost NaN"):
        search_modes(three_modes(a=math.nan, b=1.0), 0.5)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("strategy", "best", "none of probe, comp, fixed, greedy"),
        ("step", 0.0, r"not in \(0, 1\)"),
        ("exploration", 1.5, r"not in \[0, 1\]"),
        ("temperature", 0.0, "not above 0"),
        ("memory", -0.1, r"not in \[0, 1\]"),
        ("horizon", 0, "not at least 1"),
        ("tolerance", 1.0, r"not in \[0, 1\)"),
    ],
)
def test_options_that_cannot_be_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchOptions(**{option: value})


@pytest.mark.parametrize("target", [0, -0.1, 1.1, 50, True, "half"])
def test_a_target_that_is_no_share_is_refused(target: Any) -> None:
    with pytest.raises(InputError, match=r"is not in \(0, 1\]"):
        search_modes(three_modes(), target)


def test_an_order_names_every_mode_once() -> None:
    with pytest.raises(InputError, match="must name every mode once; the modes are a, b, c"):
        modes_of("fixed", three_modes(), order=("a", "b"))
    with pytest.raises(InputError, match="there is no mode to search over"):
        search_modes(Units({}, {}, {}), 0.5)


def test_a_stage_is_plain_values() -> None:
    import json

    stage = search_modes(three_modes(), 0.9).stages[0]
    row = json.loads(json.dumps(stage.as_dict()))
    assert (row["stage"], row["mode"], row["why"], row["changes"]) == (1, "b", "cheapest of all", {"b": 5})
    assert row["flops"] == pytest.approx(0.95)
    assert row["costs"] == pytest.approx({"a": 3.0, "b": 1.0, "c": 2.0})
