"""Adapters under a mask: what is trained, what is computed, and a merge that changes no bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mfcompile
from mfcompile.low_rank import LowRank
from tests.masked_models import assert_pruned, batch, effective, masked, small, small_masks, train


def adapted(steps: int = 3) -> nn.Module:
    """A model whose adapters have been trained."""
    torch.manual_seed(0)
    model = masked()
    mfcompile.add_lora(model, rank=2)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, torch.optim.AdamW(trainable, lr=0.05, weight_decay=0.1), steps)
    return model


def adapters(model: nn.Module) -> list[LowRank]:
    return [item for item in model.modules() if isinstance(item, LowRank)]


def test_adapters_start_as_nothing_and_train_alone() -> None:
    model, before = masked().eval(), masked().eval()
    names = mfcompile.add_lora(model, rank=2, alpha=3.0)
    assert names == ("up.weight", "down.weight", "first.weight")  # no convolution
    assert torch.equal(model(batch()[0]), before(batch()[0]))
    trainable = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"down", "up"}
    assert len(adapters(model)) == 3  # the tied weight has one
    assert {item.scale for item in adapters(model)} == {1.5}


def test_the_mask_lies_over_the_sum() -> None:
    model = adapted()
    item = adapters(model)[0]
    summed = dict(model.named_parameters())["up.weight"] + 2.0 * item.up @ item.down
    assert item.up.any()
    assert torch.equal(effective(model, "up.weight"), summed.detach() * small_masks()["up.weight"])
    assert_pruned(model)
    assert torch.equal(effective(model, "first.weight"), effective(model, "second.weight"))


def test_merging_changes_no_bit_and_no_pruned_place() -> None:
    model = adapted().eval()
    dense = {name: value.clone() for name, value in model.named_parameters()}
    expected = model(batch()[0])
    assert mfcompile.merge_lora(model) is model
    assert not adapters(model)
    assert torch.equal(model(batch()[0]), expected)
    assert_pruned(model)
    for name, mask in small_masks().items():
        stored = dict(model.named_parameters())[name]
        assert torch.equal(stored[~mask], dense[name][~mask])
    plain = mfcompile.strip(model)
    assert torch.equal(plain(batch()[0]), expected)
    assert list(plain.state_dict()) == list(small().state_dict())


def test_stripping_merges() -> None:
    model = adapted().eval()
    expected = model(batch()[0])
    plain = mfcompile.strip(copy.deepcopy(model))
    assert torch.equal(plain(batch()[0]), expected)
    assert type(plain.get_submodule("up")) is nn.Linear
    assert plain.get_parameter("up.weight").requires_grad
    assert torch.equal(model(batch()[0]), expected)


def test_a_state_dict_holds_what_is_computed_and_what_is_trained() -> None:
    model = adapted().eval()
    state = model.state_dict()
    extra = set(state) - set(small().state_dict())
    assert extra >= {"up.weight_lora.base", "up.weight_lora.down", "up.weight_lora.up"}
    plain = small(seed=1).eval()
    plain.load_state_dict({name: value for name, value in state.items() if name not in extra})
    assert torch.equal(plain(batch()[0]), model(batch()[0]))
    again = masked(seed=1).eval()
    mfcompile.add_lora(again, rank=2)
    again.load_state_dict(state)
    assert torch.equal(again(batch()[0]), model(batch()[0]))
    assert torch.equal(adapters(again)[0].up, adapters(model)[0].up)
    assert torch.equal(pickle.loads(pickle.dumps(model))(batch()[0]), model(batch()[0]))
    fresh = masked(seed=1)
    mfcompile.add_lora(fresh, rank=2)
    missing = fresh.load_state_dict(small().state_dict(), strict=False).missing_keys
    assert "up.weight_lora.down" in missing


def test_patterns_choose_what_is_adapted() -> None:
    model = masked()
    assert mfcompile.add_lora(model, targets=["region:vision"], ignore=["up"]) == ("down.weight", "first.weight")
    assert not effective(model, "up.weight").requires_grad
    with pytest.raises(mfcompile.InputError, match="targets: the pattern 'upp' matches no linear weight"):
        mfcompile.add_lora(masked(), targets=["upp"])
    with pytest.raises(mfcompile.InputError, match="leave no masked matrix"):
        mfcompile.add_lora(masked(), targets=["up"], ignore=["up"])


def test_what_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(mfcompile.InputError, match="Small has no masked matrix to adapt"):
        mfcompile.add_lora(small())
    with pytest.raises(mfcompile.InputError, match=r"up\.weight has an adapter already: merge it first"):
        mfcompile.add_lora(adapted(0))
    with pytest.raises(mfcompile.InputError, match="rank must be at least 1, got 0"):
        mfcompile.add_lora(masked(), rank=0)
    with pytest.raises(mfcompile.InputError, match="Small has no adapters to merge"):
        mfcompile.merge_lora(masked())
