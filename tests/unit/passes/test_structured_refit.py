"""Least squares after structured removal, against plain NumPy on what hooks see of the user's own model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from mfcompile.structure import StructuralUnits, refit_removed
from tests.structured_models import largest_difference, outputs, some_of, spread_out
from tests.structured_traps import (
    TOKENS,
    WIDTH,
    Around,
    Attention,
    Gated,
    GatedInOne,
    Plain,
    PointwiseConvolutions,
    SharedInput,
    Twice,
)
from tests.token_models import clip_like, llava_like
from tests.unit.passes.test_observers import linear_inputs

Inputs = Mapping[str, list[Tensor]]

# Sums of float32 products, solved in float64 and stored in float32.
RTOL, ATOL = 1e-3, 1e-4


def images(rows: int = 40, seed: int = 3) -> dict[str, Tensor]:
    return {"image": torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))}


def by_numpy(
    rows: NDArray[np.float64], weight: Tensor, bias: Tensor | None, kept: NDArray[np.bool_], damping: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values of all columns and of the bias: the damping is more tokens, of one input each and without a bias."""
    dense = weight.detach().double().numpy()
    ridge = np.sqrt(damping * (rows**2).sum(0).mean())
    ones = np.ones((len(rows), 1 if bias is not None else 0))
    own = 0 if bias is None else bias.detach().double().numpy()
    count = int(kept.sum())
    left = np.block([[rows[:, kept], ones], [ridge * np.eye(count), np.zeros((count, ones.shape[1]))]])
    right = np.concatenate([rows @ dense.T + own, ridge * dense[:, kept].T])
    solution = np.linalg.lstsq(left, right, rcond=None)[0].T
    values = np.zeros_like(dense)
    values[:, kept] = solution[:, :count]
    return values, solution[:, count:].squeeze(-1) if bias is not None else np.zeros(len(dense))


def kept_columns(units: StructuralUnits, name: str, elements: Sequence[int]) -> NDArray[np.bool_]:
    unit = units.unit(name)
    kept = np.ones(sum(map(len, unit.inputs)), bool)
    kept[[column for element in elements for column in unit.columns(element)]] = False
    return kept


def refitted(
    model: nn.Module,
    units: StructuralUnits,
    remove: Mapping[str, Sequence[int]],
    batch: Any,
    damping: float = 0.01,
    keep: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of the model, one W_out after the other: zeros in what went, and the values of NumPy in the rest."""
    changed = copy.deepcopy(model)
    for unit in [unit for unit in units.units if unit.name in remove]:
        calls = linear_inputs(changed, batch)[unit.output_weight]
        rows = torch.cat([_counted(item, (keep or {}).get(unit.name)) for item in calls])
        owner = changed.get_submodule(unit.output_weight.rpartition(".")[0])
        bias = getattr(owner, "bias", None)
        kept = kept_columns(units, unit.name, remove[unit.name])
        weight, own = by_numpy(rows.double().numpy(), changed.get_parameter(unit.output_weight), bias, kept, damping)
        with torch.no_grad():
            changed.get_parameter(unit.output_weight).copy_(torch.from_numpy(weight))
            if bias is not None:
                bias.copy_(torch.from_numpy(own))
    return changed


def _counted(activation: Tensor, keep: Tensor | None) -> Tensor:
    return activation.reshape(-1, activation.shape[-1]) if keep is None else activation[keep]


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, CapturedGraph, StructuralUnits]:
    torch.manual_seed(0)
    model = spread_out(Around(Attention("slices", groups=2), GatedInOne("chunk"), Attention("fused"), Plain(), Gated()))
    captured = mfcompile.with_token_program(mfcompile.capture(model, images(4)))
    return model, captured, mfcompile.find_units(captured)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_values_are_those_of_lstsq_layer_after_layer(
    mixed: tuple[nn.Module, CapturedGraph, StructuralUnits], damping: float
) -> None:
    model, captured, units = mixed
    remove = some_of(units)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller = mfcompile.remove_units(captured, remove, refit={"damping": damping, "passes": None}, calibration=[images()])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = refitted(model, units, remove, images(), damping)
    for unit in units.units:
        kept = torch.from_numpy(kept_columns(units, unit.name, remove[unit.name]))
        own, its = (item.get_parameter(unit.output_weight).detach() for item in (smaller.module, expected))
        torch.testing.assert_close(own, its[:, kept], rtol=RTOL, atol=ATOL)
    for name in ("parts.0.out.bias", "parts.1.down.bias", "parts.3.b.bias"):
        torch.testing.assert_close(
            smaller.module.get_parameter(name), expected.get_parameter(name), rtol=RTOL, atol=ATOL, msg=name
        )
        assert not torch.allclose(smaller.module.get_parameter(name), model.get_parameter(name), atol=0.01)
    assert largest_difference(outputs(expected, images(seed=5)), outputs(smaller.module, images(seed=5))) < RTOL
    assert [name for name, _ in smaller.module.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not smaller.diagnostics


def test_batches_may_be_cut_anyhow(mixed: tuple[nn.Module, CapturedGraph, StructuralUnits]) -> None:
    _, captured, units = mixed
    remove, whole = some_of(units), images()["image"]
    parts = [{"image": part} for part in torch.split(whole, 16)]
    found = [
        mfcompile.remove_units(captured, remove, refit=True, calibration=given)
        for given in ([images()], parts, iter(parts), lambda: iter(parts))
    ]
    for other in found[1:]:
        assert largest_difference(outputs(found[0].module, images(seed=5)), outputs(other.module, images(seed=5))) < RTOL


@pytest.mark.parametrize("seed", range(3))
def test_no_layer_is_farther_from_its_output_than_after_removal_alone(
    mixed: tuple[nn.Module, CapturedGraph, StructuralUnits], seed: int
) -> None:
    _, captured, units = mixed
    for unit in units.units:
        remove = {unit.name: some_of(units, seed)[unit.name]}
        found = refit_removed(captured, remove, [images()], {"damping": 10.0**-seed})
        (update,) = found.updates
        assert update.name == unit.output_weight
        assert update.error < update.masked_error
        measured = [error_of(captured, unit, remove, values) for values in ({}, found.values)]
        assert measured[0] == pytest.approx(update.masked_error, rel=1e-3)
        assert measured[1] == pytest.approx(update.error, rel=1e-3)


def error_of(captured: CapturedGraph, unit: Any, remove: Mapping[str, Sequence[int]], values: Mapping[str, Tensor]) -> float:
    """Squared error of a layer's output over all tokens, in the model whose inputs are the dense one's."""
    rows = linear_inputs_of(captured, unit)
    weight = captured.parameter(unit.output_weight).detach().double()
    bias = unit.output_weight.replace("weight", "bias")
    kept = kept_columns(StructuralUnits((unit,), ()), unit.name, remove[unit.name])
    new = values.get(unit.output_weight, weight * torch.from_numpy(kept)).double()
    assert not new[:, ~kept].any()
    shift = values[bias].double() - captured.parameter(bias).detach().double() if bias in values else 0.0
    return float((rows @ weight.mT - rows @ new.mT - shift).square().sum())


def linear_inputs_of(captured: CapturedGraph, unit: Any) -> Tensor:
    """Inputs of W_out in the user's own model, which has an nn.Linear there."""
    torch.manual_seed(0)
    model = spread_out(Around(Attention("slices", groups=2), GatedInOne("chunk"), Attention("fused"), Plain(), Gated()))
    (rows,) = linear_inputs(model, images())[unit.output_weight]
    return rows.reshape(-1, rows.shape[-1]).double()


def test_what_others_can_say_is_lost_without_loss() -> None:
    """Channels that repeat others, or add them up, or are always the same: nothing is lost with them."""
    torch.manual_seed(0)
    model = spread_out(Around(Plain(), Attention("sdpa")))
    part: Any = model.get_submodule("parts.0")
    with torch.no_grad():
        part.a.weight[5], part.a.bias[5] = part.a.weight[2], part.a.bias[2]
        part.a.weight[9], part.a.bias[9] = 0.0, 1.5  # a constant, which the bias takes over
        attention: Any = model.get_submodule("parts.1")
        attention.v.weight[4:8] = 2 * attention.v.weight[:4]  # the second head says what the first does, in other words
        attention.v.bias[4:8] = 2 * attention.v.bias[:4]
        for item in (attention.q, attention.k):
            item.weight[4:8], item.bias[4:8] = item.weight[:4], item.bias[:4]
    captured = mfcompile.capture(model, images(4))
    remove = {"parts.0": [5, 9], "parts.1": [1]}
    dense = outputs(model, images(seed=5))
    plain = mfcompile.remove_units(captured, remove)
    refit = mfcompile.remove_units(captured, remove, refit={"damping": 1e-9}, calibration=[images()])
    assert largest_difference(dense, outputs(plain.module, images(seed=5))) > 0.1
    assert largest_difference(dense, outputs(refit.module, images(seed=5))) < 1e-4


def test_a_layer_called_twice_and_tied_weights_are_fitted_to_all_their_calls() -> None:
    torch.manual_seed(0)
    for model in (Around(Twice(Plain())), Around(SharedInput())):
        spread_out(model)
        captured = mfcompile.capture(model, images(4))
        units = mfcompile.find_units(captured)
        remove = some_of(units)
        smaller = mfcompile.remove_units(captured, remove, refit=True, calibration=[images()])
        expected = refitted(model, units, remove, images())
        assert not smaller.diagnostics
        assert largest_difference(outputs(expected, images(seed=5)), outputs(smaller.module, images(seed=5))) < RTOL


class TiedOutputs(nn.Module):
    """Two layers over one weight each, for elements and for outputs, with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = Plain(8), Plain(8), nn.Linear(WIDTH, 3)
        self.two.a.weight, self.two.b.weight = self.one.a.weight, self.one.b.weight

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.last(self.two(self.one(image)))
        return result


def test_tied_output_weights_get_one_value_and_keep_biases_that_differ() -> None:
    torch.manual_seed(0)
    model = spread_out(TiedOutputs())
    captured = mfcompile.capture(model, images(4))
    (unit,) = mfcompile.find_units(captured).units
    assert (unit.output_weight, unit.region) == ("one.b.weight", "vision")  # the name under which statistics have it too
    smaller = mfcompile.remove_units(captured, {unit.name: [0, 3, 4]}, refit=True, calibration=[images()])
    own = dict(smaller.module.named_parameters(remove_duplicate=False))
    assert own["one.b.weight"] is own["two.b.weight"]
    assert torch.equal(own["two.b.bias"], model.get_parameter("two.b.bias"))
    seen = linear_inputs(model, images())
    rows = torch.cat([item.reshape(-1, 8) for item in (*seen["one.b.weight"], *seen["two.b.weight"])])
    kept = kept_columns(mfcompile.find_units(captured), unit.name, [0, 3, 4])
    expected, _ = by_numpy(rows.double().numpy(), model.get_parameter("one.b.weight"), None, kept, 0.01)
    torch.testing.assert_close(own["one.b.weight"].detach(), torch.from_numpy(expected[:, kept]).float(), rtol=RTOL, atol=ATOL)


def test_convolutions_of_single_places_are_layers_too() -> None:
    torch.manual_seed(0)
    model = spread_out(Around(PointwiseConvolutions()))
    captured = mfcompile.capture(model, images(4))
    remove = some_of(mfcompile.find_units(captured))
    (update,) = refit_removed(captured, remove, [images()]).updates
    assert update.left is None
    plain = mfcompile.remove_units(captured, remove)
    refit = mfcompile.remove_units(captured, remove, refit=True, calibration=[images()])
    dense, *found = (outputs(item, images()) for item in (model, plain.module, refit.module))
    assert distance(dense, found[1]) < 0.8 * distance(dense, found[0])


def distance(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Squared, over all outputs."""
    return sum(float((first[name] - second[name]).square().sum()) for name in first)


@pytest.mark.parametrize("build", [clip_like, llava_like])
def test_models_of_transformers_lose_less(build: Any) -> None:
    """Two towers; grouped keys and gated layers without biases, of which the padding of the text counts for nothing."""
    model, batch = build()
    spread_out(model)
    captured = mfcompile.with_token_program(mfcompile.capture(model, batch))
    units = mfcompile.find_units(captured)
    remove = some_of(units, share=0.3)
    found = refit_removed(captured, remove, [batch])
    assert [item.left for item in found.updates] == [None] * len(units.units)
    assert all(item.error < 0.9 * item.masked_error for item in found.updates)
    plain, refit = (mfcompile.remove_units(captured, remove, refit=given) for given in (False, True))
    assert [tensor.shape for tensor in plain.module.parameters()] == [tensor.shape for tensor in refit.module.parameters()]
    dense, *others = (_last(item, batch) for item in (model, plain.module, refit.module))
    assert (dense - others[1]).square().sum() < 0.7 * (dense - others[0]).square().sum()


def _last(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        found = output_tensors(model(**batch))
    return found.get("image_embeds", next(iter(found.values())))


class Reader(nn.Module):
    """Text alone, with blocks whose layers have padding among their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Plain(24) for _ in range(2))
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.table(input_ids)
        for block in self.blocks:
            states = block(states)
        counted = attention_mask.unsqueeze(-1).float()
        result: Tensor = self.last((states * counted).sum(1) / counted.sum(1))
        return result


def text(padding: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(1, 50, (6, 9), generator=generator), torch.ones(6, 9, dtype=torch.long)
    ids[2:, 4:], mask[2:, 4:] = padding, 0
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    model = spread_out(Reader())
    captured = mfcompile.capture(model, text(0))
    units = mfcompile.find_units(captured)
    remove = some_of(units)
    first, second = (
        mfcompile.remove_units(captured, remove, refit={"passes": None}, calibration=[text(item)]) for item in (0, 7)
    )
    for own, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(own, other)
    is_word = text(0)["attention_mask"].bool()
    keep = {unit.name: is_word.reshape(-1) for unit in units.units}  # the layers are written over flat tokens
    expected = refitted(model, units, remove, text(0), keep=keep)
    weight = expected.get_parameter("blocks.1.b.weight")[:, kept_columns(units, "blocks.1", remove["blocks.1"])]
    torch.testing.assert_close(first.module.get_parameter("blocks.1.b.weight"), weight, rtol=RTOL, atol=ATOL)


def test_behind_a_cut_of_tokens_those_that_stay_count() -> None:
    model, batch = clip_like()
    spread_out(model)
    captured = mfcompile.prune_tokens(mfcompile.capture(model, batch), 0.6)
    units = mfcompile.find_units(captured)
    remove = {unit.name: some_of(units)[unit.name] for unit in units.units if unit.kind == "channels"}
    found = refit_removed(captured, remove)
    assert all(item.error < item.masked_error for item in found.updates)
    smaller = mfcompile.remove_units(captured, remove, refit=True)
    own = smaller.exported
    assert own is not None
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"
    assert torch.equal(own.program.state_dict[name], smaller.module.get_parameter(name))


def test_the_share_that_scores_lowest_is_made_up_for() -> None:
    torch.manual_seed(0)
    model = spread_out(Around(Plain(), Attention("sdpa")))
    captured = mfcompile.capture(model, images(4))
    plain = mfcompile.prune_structure(captured, 0.5)
    refit = mfcompile.prune_structure(captured, 0.5, refit=True, calibration=[images()])
    dense, *found = (outputs(item, images(seed=5)) for item in (model, plain.module, refit.module))
    assert torch.equal(refit.module.get_parameter("parts.0.a.weight"), plain.module.get_parameter("parts.0.a.weight"))
    assert distance(dense, found[1]) < 0.7 * distance(dense, found[0])


def test_what_is_not_refitted_is_told() -> None:
    torch.manual_seed(0)
    model = spread_out(Around(Plain()))
    part: Any = model.get_submodule("parts.0")
    with torch.no_grad():
        part.a.weight.zero_()
        part.a.bias.zero_()
    smaller = mfcompile.remove_units(mfcompile.capture(model, images(4)), {"parts.0": [1]}, refit=True)
    assert [str(item) for item in smaller.diagnostics] == [
        "parts.0.b.weight: it is not refitted: its input is zero in every calibration token"
    ]


def test_what_cannot_be_asked_for(mixed: tuple[nn.Module, CapturedGraph, StructuralUnits]) -> None:
    _, captured, units = mixed
    with pytest.raises(InputError, match="give refit=True with it, or leave it out"):
        mfcompile.remove_units(captured, {"parts.3": [0]}, calibration=[images()])
    with pytest.raises(InputError, match="least-squares has no option 'ridge'; its options are damping"):
        mfcompile.remove_units(captured, {"parts.3": [0]}, refit={"ridge": 1})
    masks = mfcompile.select_masks(captured, mfcompile.infer_regions(captured), sparsity=0.5, criterion="magnitude")
    with pytest.raises(InputError, match="refit first, then mask"):
        mfcompile.remove_units(mfcompile.apply_masks(captured, masks), some_of(units), refit=True)
    with pytest.raises(InputError, match="there is no unit of that name"):
        mfcompile.remove_units(captured, {"nowhere": [0]}, refit=True)
    assert isinstance(mfcompile.remove_units(captured, {}, refit=True), CapturedGraph)
