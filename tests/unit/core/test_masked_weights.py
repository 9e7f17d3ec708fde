"""A masked module looks plain from outside: state dicts, copies, averages, pickles, dtypes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import AveragedModel

import mfcompile
from mfcompile.masked_weights import masked_parameters, masks_of, put_masks
from tests.masked_models import assert_pruned, batch, effective, loss_of, masked, small, small_masks, train, zeroed

make_ema: Any = swa_utils.get_ema_multi_avg_fn


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_dict_is_that_of_a_plain_model_with_zeros() -> None:
    state = masked().state_dict()
    assert_same_state(state, zeroed(small(), small_masks()).state_dict())
    assert list(state._metadata) == list(small().state_dict()._metadata)  # type: ignore[attr-defined]
    assert state["first.weight"] is state["second.weight"]
    nested = nn.ModuleDict({"model": masked()})
    expected = nn.ModuleDict({"model": zeroed(small(), small_masks())})
    assert_same_state(nested.state_dict(), expected.state_dict())
    assert_same_state(nested.state_dict(prefix="a."), expected.state_dict(prefix="a."))
    target: dict[str, Any] = {}
    with pytest.warns(FutureWarning, match="Positional args"):
        nested.state_dict(target, "b.")  # type: ignore[call-overload]
    assert list(target) == list(expected.state_dict(prefix="b."))


def test_a_masked_root_has_a_plain_state_dict_too() -> None:
    dense = nn.Linear(3, 2)
    masks = mfcompile.MaskSet({"weight": mfcompile.masks_of(masked()).packed["down.weight"]})
    with pytest.raises(mfcompile.InputError, match="belong to another model"):
        mfcompile.mask_module(dense, masks)
    wide = nn.Linear(16, 6)
    module = mfcompile.mask_module(wide, masks)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert type(module).__name__ == "Linear"
    module.load_state_dict(wide.state_dict())


def test_reading_the_state_leaves_the_dense_values_of_a_shared_model() -> None:
    dense = small()
    before = copy.deepcopy(dense.state_dict())
    mfcompile.mask_module(dense, small_masks()).state_dict()
    assert_same_state(dense.state_dict(), before)


def test_a_state_dict_that_keeps_variables_carries_gradients() -> None:
    model = masked()
    state = model.state_dict(keep_vars=True)
    total: Any = (state["up.weight"] * 2).sum()
    total.backward()
    gradient = {name: original.grad for name, original, _ in masked_parameters(model)}["up.weight"]
    assert torch.equal(gradient, 2.0 * small_masks()["up.weight"])  # type: ignore[arg-type]


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_state_dict_is_loaded_and_masked(assign: bool) -> None:
    model = masked()
    model.load_state_dict(copy.deepcopy(small(seed=1).state_dict()), assign=assign)
    assert_pruned(model)
    expected = zeroed(small(seed=1), small_masks()).eval()
    assert torch.equal(model.eval()(batch()[0]), expected(batch()[0]))


def test_a_plain_model_loads_the_state_of_a_masked_one() -> None:
    model = masked()
    train(model, sgd(model))
    plain = small(seed=1)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert_pruned(plain)
    assert torch.equal(plain.eval()(batch()[0]), model.eval()(batch()[0]))


def test_what_is_missing_has_its_plain_name() -> None:
    state = small().state_dict()
    del state["up.weight"]
    found = masked().load_state_dict(state, strict=False)
    assert found.missing_keys == ["up.weight"]
    assert found.unexpected_keys == []
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "up.weight"'):
        masked().load_state_dict(state)


def test_averages_that_are_kept_by_the_names_of_parameters_are_loaded_too() -> None:
    other, model = masked(seed=1), masked()
    found = model.load_state_dict(dict(other.named_parameters()), strict=False)
    assert not found.unexpected_keys
    assert not set(found.missing_keys) & {"conv.weight", "up.weight", "down.weight", "first.weight"}
    assert torch.equal(effective(model, "up.weight"), effective(other, "up.weight"))


def test_stripping_a_copy_leaves_the_masked_model() -> None:
    model = masked()
    plain = mfcompile.strip(copy.deepcopy(model))
    assert type(plain.get_submodule("up")) is nn.Linear
    assert list(plain.state_dict()) == list(small().state_dict())
    train(model, sgd(model))
    assert_pruned(model)
    assert not torch.equal(effective(model, "up.weight"), effective(plain, "up.weight"))


def test_a_copy_trains_apart() -> None:
    model = masked()
    twin = copy.deepcopy(model)
    before = effective(model, "up.weight").clone()
    train(twin, sgd(twin))
    assert torch.equal(effective(model, "up.weight"), before)
    assert_pruned(twin)
    twin.state_dict()["up.weight"].fill_(3.0)  # a copy owns what its state dict gives
    assert torch.equal(effective(twin, "up.weight"), 3.0 * small_masks()["up.weight"])


def fill(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.fill_(3.0)


def average(module: nn.Module, kind: str) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    """An averaged copy, and what updates it, in three ways that are in use."""
    if kind != "state dict":
        ema = make_ema(0.5) if kind == "ema" else None
        averaged = AveragedModel(module, multi_avg_fn=ema, use_buffers=True)
        return averaged.module, averaged.update_parameters
    copied = copy.deepcopy(module)

    def update(model: nn.Module) -> None:  # as in ultralytics and timm: in place, through two state dicts
        with torch.no_grad():
            for own, new in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
                own.copy_(0.5 * own + 0.5 * new)

    return copied, update


@pytest.mark.parametrize("kind", ["ema", "swa", "state dict"])
def test_averages_of_weights_are_those_of_a_plain_model(kind: str) -> None:
    model, plain = masked(), zeroed(small(), small_masks())
    found, update = average(model, kind)
    expected, update_plain = average(plain, kind)
    for seed in range(3):
        with torch.no_grad():
            for _, original, mask in {id(item[1]): item for item in masked_parameters(model)}.values():
                original.add_(torch.where(mask, 0.1 * (seed + 1), 9.0))  # rubbish where it is pruned
            for name, mask in small_masks().items():
                plain.get_parameter(name).add_(0.1 * (seed + 1) * mask)
        update(model)
        update_plain(plain)
    assert_pruned(found)
    for name in small_masks():
        torch.testing.assert_close(effective(found, name), effective(expected, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_masked_module_is_pickled_and_trains_on(how: str) -> None:
    model = masked()
    data = io.BytesIO()
    if how == "pickle":
        twin: Any = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, data)
        data.seek(0)
        twin = torch.load(data, weights_only=False)
    assert type(twin) is type(small())
    stored = [original for name, original, _ in masked_parameters(twin) if name in ("first.weight", "second.weight")]
    assert stored[0] is stored[1]
    assert masks_of(twin) == small_masks()
    assert_same_state(twin.state_dict(), model.state_dict())
    train(twin, sgd(twin))
    assert_pruned(twin)
    assert_pruned(mfcompile.strip(twin))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_masks(dtype: torch.dtype) -> None:
    model = masked().to(dtype)
    weight = effective(model, "up.weight")
    assert weight.dtype == dtype
    assert not weight[~small_masks()["up.weight"]].any()
    assert model.eval()(batch()[0].to(dtype)).dtype == dtype
    assert all(mask.dtype == torch.bool for _, _, mask in masked_parameters(model))


def test_masks_are_no_buffers_and_move_with_the_module() -> None:
    assert [name for name, _ in masked().named_buffers()] == [name for name, _ in small().named_buffers()]
    moved = masked().to("meta")
    assert moved(batch()[0].to("meta")).device.type == "meta"
    assert_pruned(moved.to_empty(device="cpu").to(torch.float64).apply(fill))  # no mask was lost where there are no values


def test_what_is_frozen_stays_and_what_is_not_moves() -> None:
    model = masked()
    model.get_submodule("up").requires_grad_(False)
    frozen, moving = effective(model, "up.weight").clone(), effective(model, "down.weight").clone()
    train(model, sgd(model))
    assert torch.equal(effective(model, "up.weight"), frozen)
    assert not torch.equal(effective(model, "down.weight"), moving)
    assert_pruned(model.eval())
    assert_pruned(model.train())


def test_masks_that_are_in_force_can_be_read() -> None:
    found = masks_of(masked())
    assert found == small_masks()
    assert found.regions == small_masks().regions
    assert (found.fingerprint, found.sparsity) == ("of the dense one", 0.63)
    assert not masks_of(small())


def test_masks_are_put_all_or_not_at_all() -> None:
    model = small()
    masks = small_masks()
    unknown = mfcompile.MaskSet({**masks.packed, "other.weight": masks.packed["up.weight"]})
    with pytest.raises(mfcompile.InputError, match=r"the masks hold other\.weight \(16, 32\)"):
        put_masks(model, unknown, shared=False)
    assert type(model.up) is nn.Linear
    parameters = {id(parameter) for parameter in model.parameters()}
    put_masks(model, masks, shared=False)
    assert {id(parameter) for parameter in model.parameters()} == parameters  # an optimizer made before knows them
    loss_of(model).backward()
    assert_pruned(model)


def test_tied_weights_share_their_gradient_and_their_zeros() -> None:
    model = masked()
    train(model, sgd(model))
    assert torch.equal(effective(model, "first.weight"), effective(model, "second.weight"))
    plain = mfcompile.strip(copy.deepcopy(model))
    assert plain.get_parameter("first.weight") is plain.get_submodule("second").weight
