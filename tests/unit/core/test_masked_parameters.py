"""A masked weight stays a parameter of its own name: for optimizers, functional calls, wrappers, and whoever replaces it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

import mfcompile
from mfcompile.masked_weights import put_masks
from tests.masked_models import Small, assert_pruned, batch, effective, loss_of, masked, small, small_masks, train, zeroed


def pruned_count() -> int:
    return small_masks().weight_count - small_masks().kept_count


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def test_parameters_have_the_names_and_the_order_of_the_dense_model() -> None:
    dense = small()
    model = mfcompile.mask_module(dense, small_masks())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in dense.named_modules()]
    assert all(one is other for one, other in zip(model.parameters(), dense.parameters(), strict=True))
    decayed = {name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim > 1}
    assert decayed == {"conv.weight", "up.weight", "down.weight", "first.weight", "head.weight"}
    assert repr(model) == repr(dense)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "in place"])
def test_what_a_masked_model_owns_is_zero_where_it_is_pruned(how: str) -> None:
    shared = masked()
    own: nn.Module = small()
    if how == "in place":
        put_masks(own, small_masks(), shared=False)
    else:
        own = copy.deepcopy(shared) if how == "deepcopy" else pickle.loads(pickle.dumps(shared))
    stored, dense = dict(own.named_parameters()), dict(shared.named_parameters())
    for name, mask in small_masks().items():
        assert torch.equal(stored[name] == 0, ~mask)
        assert dense[name][~mask].all(), "those of the dense model are left alone"
    mfcompile.add_lora(own, rank=2)
    twin = copy.deepcopy(own)
    assert torch.equal(twin.eval()(batch()[0]), own.eval()(batch()[0]))
    optimizer = torch.optim.AdamW(copy.deepcopy(shared).parameters(), lr=0.01, weight_decay=0.1)
    assert sum(int((weight == 0).sum()) for weight in optimizer.param_groups[0]["params"]) >= pruned_count()


def test_equal_layers_share_a_class() -> None:
    layers = nn.ModuleList([nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(16, 6)])
    packed = small_masks().packed["down.weight"]
    model: Any = mfcompile.mask_module(layers, mfcompile.MaskSet({"0.weight": packed, "1.weight": packed}))
    assert type(model[0]) is type(model[1]) is not type(model[2]) is nn.Linear
    assert type(mfcompile.strip(model)[0]) is nn.Linear  # type: ignore[index]


def test_the_state_of_an_optimizer_moves_between_dense_and_masked_models() -> None:
    dense = small()
    first = adamw(dense)
    train(dense, first)
    model = mfcompile.mask_module(copy.deepcopy(dense), small_masks())
    second = adamw(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    moments = {name: second.state[parameter]["exp_avg"] for name, parameter in model.named_parameters()}
    assert all(torch.equal(moments[name], first.state[parameter]["exp_avg"]) for name, parameter in dense.named_parameters())
    train(model, second)
    assert_pruned(model)


def test_functional_calls_by_plain_names_are_masked() -> None:
    model, plain = masked().eval(), zeroed(small(seed=4), small_masks()).eval()
    images, classes = batch()
    dense: dict[str, Tensor] = dict(small(seed=4).named_parameters())
    assert torch.equal(functional_call(model, dense, (images,)), plain(images))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (images,)), classes)

    gradients = grad(loss)({name: value.detach() for name, value in dense.items()})
    for name, mask in small_masks().items():
        assert gradients[name][mask].any(), name
        assert not gradients[name][~mask].any(), name


def test_an_ensemble_runs_over_an_empty_model() -> None:
    members = [masked(seed).eval() for seed in (0, 1)]
    weights, buffers = stack_module_state(members)
    images = batch()[0]
    found = vmap(lambda own, kept: functional_call(members[0], (own, kept), (images,)))(weights, buffers)
    empty = copy.deepcopy(members[0]).to("meta")
    weights["second.weight"] = weights["first.weight"]  # moving to another device unties, masks or no masks
    assert torch.equal(found, vmap(lambda own, kept: functional_call(empty, (own, kept), (images,)))(weights, buffers))
    for member, output in zip(members, found, strict=True):
        torch.testing.assert_close(output, member(images))


def test_a_model_that_is_built_without_values_is_masked_and_loaded() -> None:
    with torch.device("meta"):
        empty = Small()
    model = mfcompile.mask_module(empty, small_masks())
    model.load_state_dict(small(seed=2).state_dict(), assign=True)
    assert_pruned(model)
    train(model, adamw(model))
    assert_pruned(model)


def test_a_vector_of_parameters_is_that_of_the_dense_model() -> None:
    model, dense = masked(), small(seed=1)
    vector_to_parameters(parameters_to_vector(dense.parameters()), model.parameters())
    assert_pruned(model)
    model.load_state_dict({name: dense.state_dict()[name] for name, _ in dense.named_buffers()}, strict=False)
    assert torch.equal(model.eval()(batch()[0]), zeroed(dense, small_masks()).eval()(batch()[0]))


def test_a_parameter_that_takes_the_place_of_another_is_masked() -> None:
    model: Any = masked()
    model.up.weight = nn.Parameter(torch.ones(16, 32))
    assert torch.equal(effective(model, "up.weight"), small_masks()["up.weight"].float())
    train(model, adamw(model))
    assert_pruned(model)
    with pytest.raises(mfcompile.InputError, match=r"weight of Linear has a mask of shape \(16, 32\), the new .* is \(4, 32\)"):
        model.up.weight = nn.Parameter(torch.ones(4, 32))
    with pytest.raises(TypeError, match="cannot assign"):
        model.up.weight = torch.ones(16, 32)


def test_what_takes_the_parameter_away_is_refused() -> None:
    model: Any = masked()
    for put in (parametrizations.weight_norm, parametrizations.spectral_norm):
        with pytest.raises(mfcompile.MaskError, match="weight of Linear has a mask, and its parameter is taken away"):
            put(model.up)
    assert_pruned(model)
    del model.up._parameters["weight"]
    with pytest.raises(mfcompile.MaskError, match=r"up\.weight has a mask, and its parameter is taken away"):
        mfcompile.verify_masks(model)


def test_other_layers_may_be_normed_and_pruned_by_torch() -> None:
    dense = small()
    parametrizations.weight_norm(dense.head)
    model: Any = mfcompile.mask_module(dense, small_masks())
    prune.l1_unstructured(model.norm, "weight", 0.5)  # type: ignore[no-untyped-call]
    train(model, adamw(model))
    assert_pruned(model)


@pytest.mark.parametrize("way", ["set_swap_module_params_on_conversion", "set_overwrite_module_params_on_conversion"])
def test_every_way_of_converting_keeps_masks(way: str) -> None:
    model = masked()
    choose: Any = getattr(torch.__future__, way)
    choose(True)
    try:
        model.to(torch.bfloat16).to(torch.float32)
        model.load_state_dict(small(seed=2).state_dict())
    finally:
        choose(False)
    train(model, adamw(model))
    assert_pruned(model)


def test_replicas_hold_tensors_in_the_place_of_parameters() -> None:
    model: Any = masked()
    replica = model.up._replicate_for_data_parallel()
    for name, parameter in model.up._parameters.items():  # as torch.nn.parallel.replicate does
        setattr(replica, name, parameter * 2)
    weight = 2 * effective(model, "up.weight")
    assert torch.equal(replica.weight, weight)
    replica(torch.ones(1, 32)).sum().backward()
    gradient = model.up._parameters["weight"].grad
    assert torch.equal(gradient, 2.0 * small_masks()["up.weight"])


class TwoSteps(torch.optim.SGD):
    """Sharpness-aware: goes up by data, comes back, then steps; and averages every second step into the weights."""

    def climb(self) -> None:
        self.moved = []
        for group in self.param_groups:
            for weight in group["params"]:
                step = 0.1 * weight.grad.sign() + 0.01
                weight.data += step
                self.moved.append((weight, step))

    def step(self, closure: Any = None) -> Any:
        for weight, step in self.moved:
            weight.data -= step
        slow = [weight.detach().clone() for weight, _ in self.moved]
        super().step()
        for (weight, _), old in zip(self.moved, slow, strict=True):
            weight.data = torch.lerp(old, weight.data, 0.5)


def test_two_steps_through_data_and_slow_weights() -> None:
    model, before = masked(), effective(masked(), "up.weight")
    optimizer = TwoSteps(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        model.zero_grad(set_to_none=False)
        loss_of(model, seed).backward()
        optimizer.climb()
        assert_pruned(model)
        model.zero_grad(set_to_none=True)
        loss_of(model, seed).backward()
        optimizer.step()
    assert_pruned(model)
    assert (effective(model, "up.weight") != before)[small_masks()["up.weight"]].float().mean() > 0.9


def test_optimizers_that_step_within_backward() -> None:
    model = masked()
    optimizers: dict[Tensor, Any] = {weight: torch.optim.Adagrad([weight], lr=0.05) for weight in model.parameters()}

    def step(weight: Tensor) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()

    for weight in optimizers:
        weight.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    before = effective(model, "up.weight").clone()
    loss_of(model).backward()
    assert_pruned(model)
    assert not torch.equal(effective(model, "up.weight"), before)
