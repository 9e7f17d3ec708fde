"""Least squares after structured removal, in layers that store their weights in another order than nn.Linear."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import mfcompile
from tests.structured_models import largest_difference, outputs, some_of, spread_out
from tests.unit.passes.test_structured_refit import ATOL, RTOL, by_numpy, kept_columns


def test_layers_that_store_inputs_by_outputs_are_fitted_as_any() -> None:
    """GPT-2: fused queries, keys and values; its Conv1D takes (in, out)."""
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
    model: nn.Module = GPT2Model(sizes)
    spread_out(model.eval())
    batch = {"input_ids": torch.randint(0, 64, (24, 8)), "attention_mask": torch.ones(24, 8, dtype=torch.long)}
    captured = mfcompile.with_token_program(mfcompile.capture(model, {name: item[:2] for name, item in batch.items()}))
    units = mfcompile.find_units(captured)
    remove = some_of(units)
    assert {unit.kind for unit in units.units} == {"heads", "channels"}
    smaller = mfcompile.remove_units(captured, remove, refit={"passes": None}, calibration=[batch])
    changed = copy.deepcopy(model)
    for unit in units.units:
        layer: Any = changed.get_submodule(unit.output_weight.removesuffix(".weight"))
        rows = inputs_of(changed, layer, batch)
        kept = kept_columns(units, unit.name, remove[unit.name])
        weight, bias = by_numpy(rows.double().numpy(), layer.weight.mT, layer.bias, kept, 0.01)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight).mT)
            layer.bias.copy_(torch.from_numpy(bias))
        own = smaller.module.get_parameter(unit.output_weight).detach()
        torch.testing.assert_close(own, layer.weight.detach()[torch.from_numpy(kept)], rtol=RTOL, atol=ATOL)
    assert largest_difference(outputs(changed, batch), outputs(smaller.module, batch)) < RTOL


def inputs_of(model: nn.Module, layer: nn.Module, batch: Any) -> Tensor:
    """(tokens, in_features) of one call."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    outputs(model, batch)
    handle.remove()
    (rows,) = seen
    return rows.reshape(-1, rows.shape[-1])
