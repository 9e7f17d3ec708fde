"""ITERSNIP, CHITA, CHITA++ and TAMT from a model and its batches to masks, against replays in plain torch and NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.criteria.itersnip import iterate
from mfcompile.passes.masking import mask_module
from mfcompile.passes.pruning_run import PruningRun
from tests.models import Batch, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions
from tests.oracle import chita_reference

BATCHES = [vlm_batch((6, 3, 5), seed=seed) for seed in range(4)]
OPTIONS: dict[str, dict[str, Any]] = {
    "itersnip": {"steps": 3, "batches_per_step": 2},
    "chita": {"gradients": 3, "block_size": 60},
    "chita++": {"steps": 3, "gradients": 2, "block_size": 60},
    "tamt": {"steps": 3},
}
NAMES = [site.fqn for site in vlm_regions().pruned_sites]
SIZES = [site.weight_count for site in vlm_regions().pruned_sites]
TOTAL = sum(SIZES)


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    outputs = module(**batch)
    loss: Tensor = outputs["fused"].pow(2).mean() + outputs["match"].sum()
    return loss


def select(criterion: str, batches: Sequence[Batch] = BATCHES, **arguments: Any) -> mfcompile.MaskSet:
    arguments.setdefault("criterion_options", OPTIONS[criterion])
    arguments.setdefault("sparsity", 0.75)
    return mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion=criterion, batches=batches, loss_fn=loss_of, **arguments
    )


def flat_gradient(module: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Mean over batches of the gradient of all pruned weights, by plain autograd."""
    weights = [module.get_parameter(name) for name in NAMES]
    total = [torch.zeros_like(item) for item in weights]
    for batch in batches:
        total = [one + two for one, two in zip(total, torch.autograd.grad(loss_of(module, batch), weights), strict=True)]
    return torch.cat([item.reshape(-1) for item in total]) / len(batches)


def flat_weights(module: nn.Module) -> Tensor:
    return torch.cat([module.get_parameter(name).detach().reshape(-1) for name in NAMES])


def put(module: nn.Module, flat: Tensor) -> None:
    with torch.no_grad():
        for name, part in zip(NAMES, torch.split(flat, SIZES), strict=True):
            weight = module.get_parameter(name)
            weight.copy_(part.reshape(weight.shape))


def flat_mask(masks: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([masks[name].reshape(-1) for name in NAMES])


def largest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` largest; of equal ones the last."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    kept[scores.argsort(stable=True)[scores.numel() - count :]] = True
    return kept


# --- what holds for all ---


@pytest.mark.parametrize("sparsity", [0.0, 0.9])
@pytest.mark.parametrize("criterion", OPTIONS)
def test_as_many_weights_stay_as_were_asked_for(criterion: str, sparsity: float) -> None:
    masks = select(criterion, sparsity=sparsity)
    assert masks.kept_count == TOTAL - int(sparsity * TOTAL)
    if sparsity == 0.9:
        assert masks.digest() == select(criterion, sparsity=sparsity).digest(), "the same again"


@pytest.mark.parametrize("criterion", OPTIONS)
def test_every_region_may_have_a_sparsity_of_its_own(criterion: str) -> None:
    wanted = {"vision": 0.5, "text": 0.75, "fusion": 0.6}
    masks = select(criterion, sparsity=wanted)
    for region, sparsity in wanted.items():
        found = [masks.packed[fqn] for fqn in masks if masks.regions[fqn] == region]
        size = sum(mask.weight_count for mask in found)
        assert sum(mask.kept_count for mask in found) == size - int(sparsity * size)


@pytest.mark.parametrize("allocation", ["magnitude-per-region", "score-per-region"])
@pytest.mark.parametrize("criterion", OPTIONS)
def test_an_allocation_is_followed(criterion: str, allocation: str) -> None:
    masks = select(criterion, allocation=allocation)
    if allocation == "score-per-region":
        for region, sites in vlm_regions().by_region().items():
            size = sum(site.weight_count for site in sites)
            assert sum(masks.packed[site.fqn].kept_count for site in sites) == size - int(0.75 * size), region
        return
    same = mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion="magnitude", allocation=allocation, sparsity=0.75
    )
    assert {fqn: mask.kept_count for fqn, mask in masks.packed.items()} == {
        fqn: mask.kept_count for fqn, mask in same.packed.items()
    }


@pytest.mark.parametrize("criterion", OPTIONS)
def test_the_model_is_left_alone(criterion: str) -> None:
    model = tiny_vlm()
    model.get_parameter(NAMES[0]).grad = torch.ones_like(model.get_parameter(NAMES[0]))
    state = torch.random.get_rng_state()
    compiled = mfcompile.compile_pruned(
        model, BATCHES[0], criterion=criterion, criterion_options=OPTIONS[criterion], calibration=BATCHES, loss_fn=loss_of
    )
    for name, item in tiny_vlm().state_dict().items():
        assert torch.equal(model.state_dict()[name], item), name
    grad = model.get_parameter(NAMES[0]).grad
    assert grad is not None
    assert torch.equal(grad, torch.ones_like(grad))
    assert all(item.requires_grad for item in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bool(compiled.masks.new_values) == criterion.startswith("chita")


@pytest.mark.parametrize("criterion", ["snip", *OPTIONS])
def test_weights_that_the_loss_does_not_use_are_said(criterion: str) -> None:
    masks = mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion=criterion, criterion_options=OPTIONS.get(criterion), batches=BATCHES,
        loss_fn=lambda module, batch: module(**batch)["text"].sum(), sparsity=0.75,
    )  # fmt: skip
    said = {item.subject for item in masks.diagnostics if "depends on it in none of the batches" in item.reason}
    assert said == {name for name in NAMES if not name.startswith("text")}


@pytest.mark.parametrize("criterion", OPTIONS)
def test_a_loss_is_needed(criterion: str) -> None:
    with pytest.raises(CalibrationError, match=r"needs gradients.*loss_fn"):
        mfcompile.select_masks(vlm_captured(), vlm_regions(), None, criterion=criterion, batches=BATCHES)


@pytest.mark.parametrize(
    ("criterion", "options", "message"),
    [
        ("itersnip", {"steps": 0}, "steps must be a positive integer, got 0"),
        ("itersnip", {"schedule": "cubic"}, "schedule='cubic' is unknown"),
        ("chita", {"gradients": 1.5}, "gradients must be a positive integer"),
        ("chita", {"ridge": 0}, "ridge must be a positive number, got 0"),
        ("chita", {"samples": -1}, "samples must be a positive integer"),
        ("chita++", {"steps": True}, "steps must be a positive integer"),
        ("chita++", {"block_size": 0}, "block_size must be a positive integer"),
        ("tamt", {"steps": 0}, "steps must be a positive integer"),
        ("tamt", {"learning_rate": -1.0}, "learning_rate must be a number that is not negative"),
    ],
)
def test_options_are_checked(criterion: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(criterion, criterion_options=options)


# --- ITERSNIP ---


def test_itersnip_is_what_its_steps_say() -> None:
    model, dense = tiny_vlm(), flat_weights(tiny_vlm())
    kept = torch.ones(TOTAL, dtype=torch.bool)
    for step, batches in enumerate((BATCHES[:2], BATCHES[2:], BATCHES[:2]), start=1):
        put(model, dense * kept)
        sparsity = 0.75 if step == 3 else 1 - 0.25 ** (step / 3)
        kept = largest((flat_gradient(model, batches) * dense * kept).abs(), TOTAL - int(sparsity * TOTAL))
    masks = select("itersnip")
    assert torch.equal(flat_mask(masks), kept)
    assert not masks.new_values
    assert [str(item) for item in masks.diagnostics] == [
        "itersnip: 3 steps read 6 batches, calibration has 4: the set was read 2 times"
    ]


def test_one_step_is_snip() -> None:
    one = select("itersnip", criterion_options={"steps": 1, "batches_per_step": 4})
    snip = mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion="snip", batches=BATCHES, loss_fn=loss_of, sparsity=0.75
    )
    assert one == snip
    assert one != select("itersnip")
    assert select("itersnip", criterion_options={"steps": 3, "batches_per_step": 2, "schedule": "const"}) != one


def test_what_is_gone_does_not_return_when_nothing_has_a_gradient_any_more() -> None:
    run = PruningRun(vlm_captured(), vlm_regions(), 0.75)
    seen: list[Mapping[str, Tensor]] = []

    def gradients(step: int, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        seen.append(masks)
        weights = {name: vlm_captured().parameter(name).detach() for name in NAMES}
        # The first step removes the last weights, of equal scores the first ones would go.
        return {name: float(step == 1 and index < 18) / weight for index, (name, weight) in enumerate(weights.items())}

    masks = iterate(run, 3, "linear", gradients)
    for before, after in pairwise([*seen[1:], masks]):
        assert not (flat_mask(after) & ~flat_mask(before)).any()
    assert masks.kept_count == TOTAL - int(0.75 * TOTAL)


def test_a_pattern_that_sets_the_sparsity_leaves_one_step() -> None:
    masks = select("itersnip", pattern="2:4", sparsity=None)
    assert masks.kept_count == TOTAL // 2
    assert any("in one step" in item.reason for item in masks.diagnostics)


# --- CHITA ---


def rows_of(module: nn.Module, batches: Sequence[Batch], mask: Tensor | None = None) -> np.ndarray[Any, Any]:
    rows = torch.stack([flat_gradient(module, [batch]) for batch in batches])
    return (rows if mask is None else rows * mask).numpy()


def test_chita_is_the_reference_on_rows_of_plain_autograd() -> None:
    model = tiny_vlm()
    whole = chita_reference.problem(rows_of(model, BATCHES[:3]), flat_weights(model).numpy(), 1e-5, 3.0)
    mask, values = chita_reference.solve(whole, SIZES, TOTAL - int(0.75 * TOTAL), 60, loses_blocks=False)
    masks = select("chita")
    assert np.array_equal(flat_mask(masks).numpy(), mask)
    found = torch.cat([masks.new_values[name] for name in NAMES]).numpy()
    np.testing.assert_allclose(found, values[mask], rtol=1e-3, atol=1e-3 * np.abs(values).max())
    assert np.abs(found - flat_weights(model).numpy()[mask]).max() > 0.01


def test_iterated_chita_takes_gradients_of_the_pruned_and_updated_model() -> None:
    model, mask = tiny_vlm(), np.ones(TOTAL, np.bool_)
    for step, batches in enumerate((BATCHES[:2], BATCHES[2:], BATCHES[:2]), start=1):
        sparsity = 0.75 if step == 3 else 1 - 0.25 ** (step / 3)
        rows = rows_of(model, batches, torch.from_numpy(mask))
        whole = chita_reference.problem(rows, flat_weights(model).numpy(), 1e-5, 3.0)
        mask, values = chita_reference.solve(whole, SIZES, TOTAL - int(sparsity * TOTAL), 60, loses_blocks=False)
        put(model, torch.from_numpy(values).float())
    masks = select("chita++")
    assert np.array_equal(flat_mask(masks).numpy(), mask)
    found = torch.cat([masks.new_values[name] for name in NAMES]).numpy()
    np.testing.assert_allclose(found, values[mask], rtol=1e-2, atol=1e-3 * np.abs(values).max())


def test_one_step_of_chita_plus_plus_is_chita() -> None:
    options = {"gradients": 3, "block_size": 60}
    assert select("chita++", criterion_options={**options, "steps": 1}) == select("chita", criterion_options=options)


def test_the_samples_behind_a_row_matter_and_are_counted() -> None:
    counted = select("chita")
    assert counted == select("chita", criterion_options={**OPTIONS["chita"], "samples": 3})
    assert counted != select("chita", criterion_options={**OPTIONS["chita"], "samples": 1})


def test_new_values_are_in_force_in_the_compiled_module() -> None:
    compiled = mfcompile.compile_pruned(
        tiny_vlm(), BATCHES[0], criterion="chita", criterion_options=OPTIONS["chita"], calibration=BATCHES, loss_fn=loss_of
    )
    for name in NAMES:
        owner, _, leaf = name.rpartition(".")
        weight = getattr(compiled.module.get_submodule(owner), leaf).detach()
        mask = compiled.masks[name]
        assert torch.equal(weight[mask], compiled.masks.new_values[name])
        assert not weight[~mask].any()


class Stored(nn.Module):
    """Blocks whose weights are stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.layers:
            layer.up = nn.Parameter(torch.randn(4, 6, generator=generator))
            layer.down = nn.Parameter(torch.randn(6, 4, generator=generator))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = image + torch.tanh(image @ layer.get_parameter("up")) @ layer.get_parameter("down")
        return image


def test_weights_stored_the_other_way_round_are_put_back_so() -> None:
    batches = [torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        result: Tensor = module(batch).pow(2).mean()
        return result

    compiled = mfcompile.compile_pruned(
        Stored(), batches[0], criterion="chita", calibration=batches, loss_fn=loss, sparsity=0.5, modalities={"image": "vision"}
    )
    model = Stored()
    names = list(compiled.masks)
    assert len(names) == 3, "the last layer is no site"
    weights = [model.get_parameter(name) for name in names]
    rows = [[g.T.reshape(-1) for g in torch.autograd.grad(loss(model, batch), weights)] for batch in batches]
    whole = chita_reference.problem(
        torch.stack([torch.cat(row) for row in rows]).numpy(),
        torch.cat([item.detach().T.reshape(-1) for item in weights]).numpy(), 1e-5, 3.0,
    )  # fmt: skip
    mask, values = chita_reference.solve(whole, [24] * 3, 36, 10_000, loses_blocks=False)
    for name, own, new in zip(names, np.split(mask, 3), np.split(values, 3), strict=True):
        shape = model.get_parameter(name).T.shape
        assert np.array_equal(compiled.masks[name].numpy(), own.reshape(shape).T), name
        found = compiled.masks.updated_weight(name, torch.zeros(tuple(reversed(shape)))).numpy()
        np.testing.assert_allclose(found, new.reshape(shape).T, rtol=1e-3, atol=1e-3 * np.abs(values).max())


def test_patterns_and_budgets_by_row_are_refused() -> None:
    with pytest.raises(InputError, match="'chita' chooses single weights together, not in patterns"):
        select("chita", pattern="4x1")
    with pytest.raises(InputError, match="CHITA sets no budget by row"):
        select("chita++", allocation="uniform-rows")


# --- TAMT ---


class _Straight(torch.autograd.Function):
    """The largest scores as ones; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int) -> Tensor:
        return largest(scores, kept).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def replay_tamt(batches: Sequence[Batch], sparsity: float, rate: float) -> tuple[Tensor, list[float]]:
    """Mask and losses, with scores as parameters, torch's own optimizer and schedule, and masks inside autograd."""
    model, dense = tiny_vlm(), flat_weights(tiny_vlm())
    kept = TOTAL - int(sparsity * TOTAL)
    uniform = mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion="magnitude", allocation="uniform", sparsity=sparsity
    )
    cut = float(dense.abs().sort().values[int(sparsity * TOTAL) - 1])
    scores = nn.Parameter(2 * cut * flat_mask(uniform).float())
    optimizer = torch.optim.AdamW([scores], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    losses = []
    for batch in batches:
        masked = _Straight.apply(scores, kept) * dense  # type: ignore[no-untyped-call]
        split = zip(NAMES, torch.split(masked, SIZES), strict=True)
        parts = {name: part.reshape(model.get_parameter(name).shape) for name, part in split}
        outputs = torch.func.functional_call(model, parts, kwargs=batch)
        loss = outputs["fused"].pow(2).mean() + outputs["match"].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return largest(scores.detach(), kept), losses


@pytest.mark.parametrize("rate", [5e-5, 1.0])
def test_tamt_is_what_its_equations_say(rate: float) -> None:
    batches = BATCHES * 2
    masks = select("tamt", batches, criterion_options={"learning_rate": rate})
    expected, _ = replay_tamt(batches, 0.75, rate)
    assert torch.equal(flat_mask(masks), expected)
    start = select("tamt", batches[:1], criterion_options={"learning_rate": 0.0})
    assert (masks == start) == (rate == 5e-5), "a score moves by about the rate in a step: little, unless it is high"


def test_the_first_batch_of_tamt_runs_with_as_many_weights_as_are_to_stay() -> None:
    """The published code's first batch runs with none."""
    living: list[int] = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        assert module.training
        living.append(sum(int((module.get_parameter(name) != 0).sum()) for name in NAMES))
        return loss_of(module, batch)

    mfcompile.select_masks(
        vlm_captured(), vlm_regions(), None, criterion="tamt", batches=BATCHES, loss_fn=loss, sparsity=0.75,
        criterion_options={"learning_rate": 0.01}, rounding="official",
    )  # fmt: skip
    assert living == [TOTAL - int(0.75 * TOTAL)] * 4


def test_tamt_trains_a_mask_that_fits_the_task_better_than_its_start() -> None:
    """A network that was trained on a task, and masks chosen for it: the start knows magnitudes only, training the loss."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(8, 8, generator=generator)
    inputs = torch.randn(8, 32, 1, 8, generator=generator)
    batches = [{"image": part, "target": torch.tanh(part @ target)} for part in inputs]

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        result: Tensor = (module(batch["image"]) - batch["target"]).pow(2).mean()
        return result

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoLayers(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for batch in batches * 40:
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    captured = mfcompile.capture(model, {"image": inputs[0]})
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})

    def pruned_loss(rate: float) -> float:
        masks = mfcompile.select_masks(
            captured, regions, None, criterion="tamt", batches=batches, loss_fn=loss, sparsity=0.7,
            criterion_options={"learning_rate": rate, "steps": 60},
        )  # fmt: skip
        pruned = mask_module(model, masks)
        return sum(float(loss(pruned, batch).detach()) for batch in batches) / len(batches)

    assert pruned_loss(0.05) < 0.6 * pruned_loss(0.0)
