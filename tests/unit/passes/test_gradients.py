"""Gradients on a copy: against plain autograd and finite differences, with the user's module left as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, UserDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.gradient_rows import Columns, gradient_rows
from mfcompile.passes.gradients import LossRunner, accumulate_gradients
from tests.losses import BATCHES, PAIR, Pair, assert_close, by_autograd, chosen, loss_of, pair_batches, square
from tests.models import Batch, tiny_vlm

# --- the gradient ---


def test_it_is_the_mean_of_what_autograd_gives() -> None:
    module = tiny_vlm()
    fqns = chosen(module)
    found = accumulate_gradients(module, BATCHES, loss_of, fqns)
    expected = by_autograd(module, BATCHES, fqns)
    assert list(found.gradients) == fqns
    assert found.batch_count == 3
    assert found.unused == ()
    for fqn in fqns:
        assert_close(found.gradients[fqn], expected[fqn])
    assert found.mean_loss == pytest.approx(sum(float(loss_of(module, batch).detach()) for batch in BATCHES) / 3, rel=1e-6)


def test_it_agrees_with_finite_differences() -> None:
    module, batches = Pair(torch.float64), pair_batches(dtype=torch.float64)
    found = accumulate_gradients(module, batches, square, PAIR).gradients["first.weight"]
    assert found.dtype == torch.float64
    step = 1e-6
    for place in ((0, 0), (2, 3), (4, 4)):
        losses = []
        for sign in (1, -1):
            moved = Pair(torch.float64)
            with torch.no_grad():
                moved.first.weight[place] += sign * step
            losses.append(sum(float(square(moved, batch).detach()) for batch in batches) / len(batches))
        assert float(found[place]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


def test_a_loss_may_be_an_object_with_a_loss() -> None:
    module = Pair()
    plain = accumulate_gradients(module, pair_batches(), square, PAIR).gradients
    wrapped = accumulate_gradients(module, pair_batches(), lambda m, b: SimpleNamespace(loss=square(m, b)), PAIR).gradients
    one = accumulate_gradients(module, pair_batches(), lambda m, b: square(m, b).reshape(1), PAIR).gradients
    for fqn in PAIR:
        assert torch.equal(plain[fqn], wrapped[fqn])
        assert torch.equal(plain[fqn], one[fqn])


def test_a_tied_weight_has_one_buffer_and_the_sum_over_its_uses() -> None:
    module, untied = Pair(), Pair()
    module.second.weight = module.first.weight
    with torch.no_grad():
        untied.second.weight.copy_(untied.first.weight)
    found = accumulate_gradients(module, pair_batches(), square, PAIR).gradients
    assert found["first.weight"] is found["second.weight"]
    expected = by_autograd(untied, pair_batches(), PAIR, square)
    assert_close(found["first.weight"], expected["first.weight"] + expected["second.weight"])


def test_parameters_in_one_memory_are_one_weight() -> None:
    module, tied = Pair(), Pair()
    module.second.weight = nn.Parameter(module.first.weight.detach())
    tied.second.weight = tied.first.weight
    found = accumulate_gradients(module, pair_batches(), square, PAIR[:1]).gradients["first.weight"]
    assert torch.equal(found, accumulate_gradients(tied, pair_batches(), square, PAIR).gradients["first.weight"])


def test_masks_are_in_force_and_in_the_gradient() -> None:
    module = tiny_vlm()
    fqns = chosen(module)
    generator = torch.Generator().manual_seed(1)
    masks = {fqn: torch.rand(module.get_parameter(fqn).shape, generator=generator) > 0.4 for fqn in fqns[::2]}
    found = accumulate_gradients(module, BATCHES, loss_of, fqns, masks=masks).gradients
    masked = tiny_vlm()
    with torch.no_grad():
        for fqn, mask in masks.items():
            masked.get_parameter(fqn).mul_(mask)
    expected = by_autograd(masked, BATCHES, fqns)
    for fqn in fqns:
        assert_close(found[fqn], expected[fqn] * masks.get(fqn, torch.ones(())))
        assert torch.equal(module.get_parameter(fqn), tiny_vlm().get_parameter(fqn))


def test_values_stand_for_the_weights() -> None:
    module, other = Pair(), Pair()
    with torch.no_grad():
        other.first.weight.mul_(-0.5)
    values = {"first.weight": other.first.weight.detach().clone()}
    mask = torch.eye(5) == 0
    found = accumulate_gradients(module, pair_batches(), square, PAIR, values=values, masks={"first.weight": mask}).gradients
    with torch.no_grad():
        other.first.weight.mul_(mask)
    expected = by_autograd(other, pair_batches(), PAIR, square)
    assert_close(found["second.weight"], expected["second.weight"])
    assert_close(found["first.weight"], expected["first.weight"] * mask)


def test_weights_can_be_exchanged_again_and_again() -> None:
    """A runner that has seen masks and values gives what a fresh one gives."""
    module, mask = Pair(), torch.eye(5) == 0
    runner = LossRunner(module, square, PAIR)
    for masks in ({}, {"second.weight": mask}, {"first.weight": ~mask}, {}):
        runner.set_weights(None, masks)
        found = runner.accumulate(pair_batches()).gradients
        fresh = accumulate_gradients(module, pair_batches(), square, PAIR, masks=masks).gradients
        for fqn in PAIR:
            assert torch.equal(found[fqn], fresh[fqn])


def test_weights_that_the_loss_does_not_use_are_said() -> None:
    module = tiny_vlm()
    fqns = chosen(module)
    found = accumulate_gradients(module, BATCHES, lambda m, b: m(**b)["text"].sum(), fqns)
    assert set(found.unused) == {fqn for fqn in fqns if not fqn.startswith("text")}
    assert all(not found.gradients[fqn].any() for fqn in found.unused)
    assert {item.subject for item in found.diagnostics} == set(found.unused)


def test_training_mode_drops_and_eval_mode_does_not() -> None:
    module = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)).train()
    batches = pair_batches()
    plain = accumulate_gradients(module, batches, square, ["0.weight"]).gradients["0.weight"]
    module.eval()
    expected = by_autograd(module, batches, ["0.weight"], square)["0.weight"]
    assert_close(plain, expected)
    dropped = accumulate_gradients(module, batches, square, ["0.weight"], training=True).gradients["0.weight"]
    assert not torch.allclose(dropped, expected)
    again = accumulate_gradients(module, batches, square, ["0.weight"], training=True).gradients["0.weight"]
    assert torch.equal(dropped, again), "the same seed gives the same dropout"
    other = accumulate_gradients(module, batches, square, ["0.weight"], training=True, seed=1).gradients["0.weight"]
    assert not torch.equal(dropped, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    module, batch = Pair(dtype), pair_batches(1, dtype)[0]
    one = by_autograd(module, [batch], PAIR, square)
    count = 600  # bfloat16 sums of equal numbers stop at 256 addends
    found = accumulate_gradients(module, [batch] * count, square, PAIR).gradients
    for fqn in PAIR:
        assert found[fqn].dtype == torch.float32
        assert_close(found[fqn], one[fqn].float(), rtol=1e-4)


# --- one buffer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_per_weight_holds_the_sum_and_is_what_is_returned(dtype: torch.dtype) -> None:
    module = Pair(dtype)
    runner = LossRunner(module, square, PAIR)
    seen: list[dict[str, int]] = []

    def watch(done: int, total: int | None) -> None:
        assert (done, total) == (len(seen) + 1, 4)
        sums = {fqn: runner.gradient_sum(fqn) for fqn in PAIR}
        seen.append({fqn: item.data_ptr() for fqn, item in sums.items() if item is not None})
        held = [leaf.grad for leaf in runner.leaves.values() if leaf.grad is not None]
        assert len(held) == (2 if dtype == torch.float32 else 0), "no second gradient waits beside the sum"

    found = runner.accumulate(pair_batches(4, dtype), progress=watch)
    assert seen == [{fqn: item.data_ptr() for fqn, item in found.gradients.items()}] * 4
    assert all(leaf.grad is None for leaf in runner.leaves.values())


def test_only_the_chosen_weights_ask_for_a_gradient() -> None:
    """Frozen layers cost no gradient: autograd is asked for one tensor per chosen weight and for nothing else."""
    asked: list[set[str]] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        asked.append({name for name, item in module.named_parameters() if item.requires_grad})
        return loss_of(module, batch)

    accumulate_gradients(tiny_vlm(), BATCHES[:1], loss, ["fusion.1.up.weight"])
    assert asked == [{"fusion.1.up.weight"}]


# --- what the user had ---


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


class Remembering(nn.Module):
    """Counts its calls in a buffer, exchanges another, clamps a parameter, and writes into its input."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair()
        self.scale = nn.Parameter(torch.tensor(7.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(4, 5))

    def forward(self, states: Tensor) -> Tensor:
        self.calls += 1
        with torch.no_grad():
            self.scale.clamp_(0.0, 1.0)
        states.mul_(1 + self.calls)
        self.last = states
        result: Tensor = self.inner(states) * self.scale
        return result


def test_the_module_the_batches_and_the_generators_are_as_before() -> None:
    module = Remembering().train()
    module.inner.second.weight.requires_grad_(False)
    module.inner.first.weight.grad = torch.full((5, 5), 2.0)
    batches = pair_batches()
    before = {name: item.clone() for name, item in module.state_dict().items()}
    objects = {name: id(item) for name, item in named_tensors(module)}
    inputs = [batch.clone() for batch in batches]
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].copy()

    def noisy(inner: nn.Module, batch: Tensor) -> Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return square(inner, batch) * noise

    accumulate_gradients(module, batches, noisy, [f"inner.{fqn}" for fqn in PAIR], seed=3)
    for name, item in module.state_dict().items():
        assert torch.equal(item, before[name]), name
    assert {name: id(item) for name, item in named_tensors(module)} == objects
    assert all(torch.equal(one, two) for one, two in zip(batches, inputs, strict=True))
    assert module.training
    assert not module.inner.second.weight.requires_grad
    assert torch.equal(module.inner.first.weight.grad, torch.full((5, 5), 2.0))
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], states[2])


def test_batch_norm_in_training_mode_leaves_its_running_statistics() -> None:
    """The operator's schema does not say that it writes them."""
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    before = {name: item.clone() for name, item in module.state_dict().items()}
    accumulate_gradients(module, pair_batches(), square, ["0.weight"], training=True)
    for name, item in module.state_dict().items():
        assert torch.equal(item, before[name]), name


def test_every_batch_meets_the_same_state() -> None:
    """What a forward pass leaves behind does not reach the next: the order of the batches does not matter."""
    module, batches = Remembering(), pair_batches()
    fqns = [f"inner.{fqn}" for fqn in PAIR]
    forward = accumulate_gradients(module, batches, square, fqns).gradients
    backward = accumulate_gradients(module, batches[::-1], square, fqns).gradients
    for fqn in fqns:
        assert_close(forward[fqn], backward[fqn])


def test_a_frozen_model_and_a_caller_in_inference_mode_do_not_matter() -> None:
    expected = accumulate_gradients(Pair(), pair_batches(), square, PAIR).gradients
    frozen = Pair().requires_grad_(False)
    with torch.inference_mode():
        born = Pair()
        born.load_state_dict(frozen.state_dict())
        found = accumulate_gradients(frozen, pair_batches(), square, PAIR).gradients
        inside = accumulate_gradients(born, pair_batches(), square, PAIR, masks={PAIR[0]: torch.ones(5, 5) > 0}).gradients
    for fqn in PAIR:
        assert torch.equal(found[fqn], expected[fqn])
        assert torch.equal(inside[fqn], expected[fqn])


def test_recurrent_layers_read_the_copy() -> None:
    """nn.LSTM keeps its weights in a second list, which must refer to the copy's."""
    module = nn.LSTM(5, 3)
    batch = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))

    def loss(inner: nn.Module, states: Tensor) -> Tensor:
        result: Tensor = inner(states)[0].pow(2).sum()
        return result

    found = accumulate_gradients(module, [batch], loss, ["weight_ih_l0"])
    assert_close(found.gradients["weight_ih_l0"], by_autograd(module, [batch], ["weight_ih_l0"], loss)["weight_ih_l0"])


@pytest.mark.parametrize("container", [dict, OrderedDict, UserDict])
def test_a_loss_may_pop_its_labels(container: Any) -> None:
    batch = container({"states": pair_batches(1)[0], "labels": torch.ones(4, 5)})

    def loss(module: nn.Module, given: Any) -> Tensor:
        labels = given.pop("labels")
        result: Tensor = (module(given["states"]) - labels).pow(2).sum()
        return result

    accumulate_gradients(Pair(), [batch, batch], loss, PAIR)
    assert set(batch) == {"states", "labels"}


def test_a_buffer_may_be_the_weight() -> None:
    class Stored(nn.Module):
        weight: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.eye(5))

        def forward(self, states: Tensor) -> Tensor:
            return states @ self.weight

    module, batch = Stored(), pair_batches(1)[0]
    found = accumulate_gradients(module, [batch], square, ["weight"]).gradients["weight"]
    assert_close(found, 2 * batch.T @ batch)
    assert not module.weight.requires_grad


# --- refusals ---


def broken(_: nn.Module, __: Tensor) -> Tensor:
    raise ValueError("no such label")


def consumed(module: nn.Module, batch: Tensor) -> Tensor:
    loss = square(module, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


REFUSALS: list[tuple[Any, str]] = [
    (lambda m, b: None, r"returned None for batch 1: return a scalar tensor"),
    (lambda m, b: {"loss": square(m, b)}, r"a dict without a loss for batch 1: return output\['loss'\]"),
    (lambda m, b: SimpleNamespace(loss=None), r"whose loss is None for batch 1: give the model the labels"),
    (lambda m, b: m(b), r"loss of batch 1 is of shape \(4, 5\); it must be one number"),
    (lambda m, b: square(m, b).detach(), r"loss of batch 1 has no gradient: .* detached"),
    (lambda m, b: square(m, b) * float("nan"), r"loss of batch 1 is nan"),
    (lambda m, b: square(m, b) / 0, r"loss of batch 1 is inf"),
    (broken, r"raised ValueError on batch 1: no such label"),
    (consumed, r"backward pass of batch 1 raised RuntimeError.*leave backward\(\) to the pruner"),
]


@pytest.mark.parametrize(("loss", "message"), REFUSALS)
def test_an_unusable_loss_names_its_batch(loss: Any, message: str) -> None:
    batches = pair_batches(2)

    def second(module: nn.Module, batch: Tensor) -> Any:
        return loss(module, batch) if torch.equal(batch, batches[1]) else square(module, batch)

    with pytest.raises(CalibrationError, match=message):
        accumulate_gradients(Pair(), batches, second, PAIR)


def test_no_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        accumulate_gradients(Pair(), [], square, PAIR)


def test_a_gradient_that_is_not_finite_names_the_weight() -> None:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        return torch.sqrt(square(module, batch * 0))  # the loss is 0, its gradient 0 / 0

    with pytest.raises(CalibrationError, match=r"gradient of first\.weight holds NaN"):
        accumulate_gradients(Pair(), pair_batches(1), loss, PAIR)
    with pytest.raises(CalibrationError, match=r"gradient of batch 0 holds NaN"):
        gradient_rows(LossRunner(Pair(), loss, PAIR), pair_batches(1), [Columns(PAIR[0], 25)], 1)


def test_weights_masks_and_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"Pair has no parameter or buffer called 'third\.weight'"):
        accumulate_gradients(Pair(), pair_batches(), square, ["third.weight"])
    with pytest.raises(InputError, match=r"masks of first\.weight are \(5,\), the weight is \(5, 5\)"):
        accumulate_gradients(Pair(), pair_batches(), square, PAIR, masks={"first.weight": torch.ones(5) > 0})
    with pytest.raises(InputError, match=r"values hold other"):
        accumulate_gradients(Pair(), pair_batches(), square, PAIR, values={"other": torch.ones(5)})


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    class Locked(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = (number for number in range(3))

    with pytest.raises(CalibrationError, match="Locked cannot be copied"):
        accumulate_gradients(Locked(), pair_batches(), square, PAIR)
