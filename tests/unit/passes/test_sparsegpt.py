"""The weight update ``sparsegpt``: its order, its kinds of weights, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.masks import MaskSet, PackedMask, fingerprint
from mfcompile.passes.mask_selection import site_weight
from mfcompile.passes.pruning_run import PruningRun
from mfcompile.passes.reconstruction import Reconstructor
from mfcompile.passes.sparsegpt import SparseGptOptions
from mfcompile.passes.weight_update import SiteUpdate, updated
from mfcompile.passes.weight_values import set_values
from tests.models import Batch, TwoLayers, rows, tiny_vlm, vlm_batch, vlm_captured, vlm_regions, vlm_statistics
from tests.unit.passes.test_experts import Mixture, image
from tests.unit.passes.test_gram import gated
from tests.unit.passes.test_observers import Repeat, linear_inputs

# The same sums of float32 products in another order, and what a linear system makes of them.
RTOL, ATOL = 1e-3, 1e-4


def vlm_batches() -> list[Batch]:
    return [vlm_batch((6, 3, 5, 2, 6), seed=seed) for seed in (1, 2, 3)]


def vlm_run(**changes: Any) -> PruningRun:
    return replace(PruningRun(vlm_captured(), vlm_regions(), 0.63, statistics=vlm_statistics(), batches=vlm_batches), **changes)


def vlm_masks(sparsity: float = 0.63) -> MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), sparsity=sparsity)


def update_of(
    model: nn.Module,
    batches: list[Any],
    sparsity: float = 0.5,
    *,
    example: Any = None,
    regions: Mapping[str, Any] | None = None,
) -> tuple[mfcompile.CapturedGraph, MaskSet, list[SiteUpdate]]:
    """A model pruned by magnitude, then updated."""
    captured = mfcompile.capture(model.eval(), batches[0] if example is None else example)
    found = mfcompile.infer_regions(captured, **(regions or {}))
    masks = mfcompile.select_masks(captured, found, sparsity=sparsity, criterion="magnitude", allocation="uniform")
    run = PruningRun(captured, found, sparsity, batches=lambda: batches)
    return captured, *updated(run, masks, SparseGptOptions(passes=None))


def sites_of(captured: mfcompile.CapturedGraph) -> tuple[mfcompile.PruneSite, ...]:
    return mfcompile.infer_regions(captured, modalities={"image": "vision"}).pruned_sites


def two_layers(seed: int = 0, width: int = 8) -> TwoLayers:
    torch.manual_seed(seed)
    return TwoLayers(width).eval()


def pixels(seed: int = 1, width: int = 8, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 9, 4, generator=generator) @ torch.randn(4, width, generator=generator)


class TestTheOrderOfTheLayers:
    def reconstructed(self, one_pass: bool) -> dict[str, Tensor]:
        """Layer after layer by hand: plain hooks, plain products, the model pruned so far put in place."""
        model, batch = two_layers(), pixels()
        weights = dict(model.named_parameters())
        dense = {name: weights[name].detach().clone() for name in weights}
        _, masks, _ = update_of(two_layers(), [batch])
        first = {name: inputs for name, (inputs,) in linear_inputs(model, {"image": batch}).items()}
        for name in masks:
            inputs = (first[name] if one_pass else linear_inputs(model, {"image": batch})[name][0]).flatten(0, -2)
            result = Reconstructor(inputs.mT @ inputs).reconstruct(dense[name], masks[name])
            with torch.no_grad():
                weights[name].copy_(result.weight)
        return {name: weights[name].detach() for name in masks}

    def test_a_layer_gets_the_inputs_that_the_pruned_model_gives_it(self) -> None:
        captured, masks, updates = update_of(two_layers(), [pixels()])
        expected = self.reconstructed(one_pass=False)
        assert [item.name for item in updates] == list(expected)
        for name, weight in expected.items():
            found = torch.where(masks[name], masks.updated_weight(name, captured.parameter(name)), 0.0)
            torch.testing.assert_close(found, weight, rtol=RTOL, atol=ATOL)

    def test_in_one_pass_all_layers_get_those_of_the_dense_model(self) -> None:
        captured, masks, _ = update_of(two_layers(), [pixels()])
        run = PruningRun(captured, mfcompile.infer_regions(captured), 0.5, batches=lambda: [pixels()])
        once, _ = updated(run, replace(masks, new_values={}), SparseGptOptions(passes=1))
        dense, pruned = self.reconstructed(one_pass=True), self.reconstructed(one_pass=False)
        name = "blocks.1.down.weight"
        found = torch.where(once[name], once.updated_weight(name, captured.parameter(name)), 0.0)
        torch.testing.assert_close(found, dense[name], rtol=RTOL, atol=ATOL)
        assert not torch.allclose(dense[name], pruned[name], rtol=RTOL, atol=ATOL)

    def test_the_number_of_passes_is_said_beforehand(self) -> None:
        said: list[tuple[int, int | None]] = []
        updated(vlm_run(progress=lambda done, total: said.append((done, total))), vlm_masks(), SparseGptOptions(passes=3))
        assert said == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def test_less_memory_makes_more_passes(self) -> None:
        said: list[int | None] = []
        options = SparseGptOptions(passes=1, memory_mib=3 * 4 * 16 * 16 / 2**20)
        updated(vlm_run(progress=lambda done, total: said.append(total)), vlm_masks(), options)
        assert said[0] is not None
        assert said[0] >= 10


def test_masks_stay_and_every_layer_comes_closer() -> None:
    before = vlm_masks()
    after, updates = updated(vlm_run(), before, SparseGptOptions())
    assert {name: mask.bits.tobytes() for name, mask in after.packed.items()} == {
        name: mask.bits.tobytes() for name, mask in before.packed.items()
    }
    assert sorted(item.name for item in updates) == sorted(site.name for site in vlm_regions().pruned_sites)
    assert all(item.error < item.masked_error for item in updates)
    assert list(after.new_values) == list(after.packed)
    for name, values in after.new_values.items():
        assert values.shape == (after.packed[name].kept_count,)
    assert after.digest() != before.digest()


def test_the_output_of_the_model_comes_closer() -> None:
    inputs = vlm_batch((5, 6, 3), seed=9)
    outputs = {}
    after, _ = updated(vlm_run(), vlm_masks(0.4), SparseGptOptions())
    for name, masks in (("masked", vlm_masks(0.4)), ("updated", after)):
        graph = mfcompile.apply_masks(vlm_captured(), masks)
        with torch.no_grad():
            outputs[name] = mfcompile.passes.masking.mask_module(graph.module, masks)(**inputs)
            dense = tiny_vlm()(**inputs)
    for key in ("image", "text"):
        assert (outputs["updated"][key] - dense[key]).norm() < 0.95 * (outputs["masked"][key] - dense[key]).norm()


def test_batches_may_be_cut_otherwise() -> None:
    one, two = vlm_batches()[0], vlm_batches()[1]
    whole, _ = updated(vlm_run(batches=lambda: [one, two]), vlm_masks(), SparseGptOptions())
    parts = [rows(two, [4, 0]), rows(one, [1]), rows(two, [1, 2, 3]), rows(one, [0, 2, 3, 4])]
    cut, _ = updated(vlm_run(batches=lambda: parts), vlm_masks(), SparseGptOptions())
    for name, values in whole.new_values.items():
        torch.testing.assert_close(cut.new_values[name], values, rtol=RTOL, atol=ATOL, msg=name)


def test_the_same_run_gives_the_same_bits() -> None:
    assert (
        updated(vlm_run(), vlm_masks(), SparseGptOptions())[0].digest()
        == updated(vlm_run(), vlm_masks(), SparseGptOptions())[0].digest()
    )


class TestKindsOfWeights:
    def test_a_weight_that_is_stored_the_other_way_round(self) -> None:
        class Turned(nn.Module):
            up: Tensor
            down: Tensor
            up_bias: Tensor
            down_bias: Tensor

            def __init__(self, plain: nn.Module) -> None:
                super().__init__()
                for name in ("up", "down"):
                    linear = getattr(plain, name)
                    self.register_parameter(name, nn.Parameter(linear.weight.detach().mT.contiguous()))
                    self.register_buffer(f"{name}_bias", linear.bias.detach())

            def forward(self, states: Tensor) -> Tensor:
                inner = torch.relu(states @ self.up + self.up_bias)
                result: Tensor = states + inner @ self.down + self.down_bias
                return result

        plain = two_layers()
        turned = two_layers()
        turned.blocks = nn.ModuleList(Turned(block) for block in plain.blocks)
        (plain_graph, plain_masks, _), (graph, masks, _) = (update_of(model, [pixels()]) for model in (plain, turned))
        for name in plain_masks:
            other = name.removesuffix(".weight")
            assert torch.equal(masks[other].mT, plain_masks[name])
            found = masks.updated_weight(other, graph.parameter(other))
            torch.testing.assert_close(
                found.mT, plain_masks.updated_weight(name, plain_graph.parameter(name)), rtol=RTOL, atol=ATOL
            )

    def test_rows_of_a_fused_weight_have_their_own_inputs(self) -> None:
        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.randn(16, 8) / 2)

            def forward(self, image: Tensor) -> Tensor:
                return torch.tanh(nn.functional.linear(torch.tanh(nn.functional.linear(image, self.w[:8])), self.w[8:]))

        torch.manual_seed(0)
        captured, masks, updates = update_of(
            Repeat(Fused), [pixels()], regions={"targets": ["*"], "modalities": {"image": "vision"}}
        )
        assert [item.name for item in updates] == [f"items.{i}.w[{part}]" for i in (0, 1) for part in ("0:8", "8:16")]
        inputs = pixels().flatten(0, 1)
        dense = captured.parameter("items.0.w").detach()
        upper = Reconstructor(inputs.mT @ inputs).reconstruct(dense[:8], masks["items.0.w"][:8]).weight
        found = torch.where(masks["items.0.w"], masks.updated_weight("items.0.w", dense), 0.0)
        torch.testing.assert_close(found[:8], upper, rtol=RTOL, atol=ATOL)
        inner = torch.tanh(inputs @ upper.mT)
        lower = Reconstructor(inner.mT @ inner).reconstruct(dense[8:], masks["items.0.w"][8:]).weight
        torch.testing.assert_close(found[8:], lower, rtol=RTOL, atol=ATOL)

    @pytest.mark.parametrize(("way", "is_turned"), [("grouped", True), ("looked up", False)])
    def test_experts_are_updated_from_their_own_tokens(self, way: str, is_turned: bool) -> None:
        example = image(length=24)
        found = {}
        for kind in ((way, is_turned), ("loop", False)):
            captured, masks, updates = update_of(
                Mixture(*kind), [example], example=example, regions={"modalities": {"image": "vision"}}
            )
            assert len([item for item in updates if item.error < item.masked_error]) > 12
            found[kind] = {
                site.name: site_weight(set_values(captured, masks), site)
                for site in mfcompile.infer_regions(captured, modalities={"image": "vision"}).pruned_sites
            }
        for name, weight in found["loop", False].items():
            torch.testing.assert_close(found[way, is_turned][name], weight, rtol=1e-2, atol=1e-3, msg=name)

    def test_an_expert_without_a_token_is_left_and_said(self) -> None:
        batch = image(length=1)[:1]
        captured, masks, updates = update_of(
            Mixture("looked up"), [batch], example=image(), regions={"modalities": {"image": "vision"}}
        )
        left = [item.name for item in updates if item.left == "it received no calibration token"]
        assert len(left) == 2 * 2 * 2  # two of four experts, up and down, in two layers
        regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
        for site in regions.pruned_sites:
            if site.name in left:
                assert torch.equal(site_weight(set_values(captured, masks), site), site_weight(captured, site))
        said = [str(item) for item in masks.diagnostics if "no calibration token" in item.reason]
        assert len(said) == 4
        assert "experts.up: 2 of its 4 experts (" in said[0]

    def test_a_stack_of_experts_is_not_unpacked_for_each_of_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        count, unpack = 0, PackedMask.unpack

        def counted(mask: PackedMask) -> Tensor:
            nonlocal count
            count += 1
            return unpack(mask)

        monkeypatch.setattr(PackedMask, "unpack", counted)
        _, masks, updates = update_of(Mixture("looked up"), [image()], regions={"modalities": {"image": "vision"}})
        assert len(updates) > 2 * len(masks)
        assert count <= 3 * len(masks), "to look for work, to rewrite, and to read the new values"

    def test_patches_of_a_convolution(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.convolution = nn.Conv2d(3, 8, 4, 4)
                self.layers = two_layers()

            def forward(self, image: Tensor) -> Tensor:
                result: Tensor = self.layers(self.convolution(image).flatten(2).mT)
                return result

        torch.manual_seed(0)
        seen = torch.nn.functional.interpolate(torch.randn(20, 3, 4, 4), size=(16, 16), mode="bilinear")
        captured, masks, _ = update_of(Net(), [seen], regions={"targets": ["convolution"], "modalities": {"image": "vision"}})
        (name,) = masks
        inputs = torch.nn.functional.unfold(seen, 4, stride=4).mT.flatten(0, 1)
        dense = captured.parameter(name).detach()
        expected = Reconstructor(inputs.mT @ inputs).reconstruct(dense.flatten(1), masks[name].flatten(1)).weight
        found = torch.where(masks[name], masks.updated_weight(name, dense), 0.0)
        torch.testing.assert_close(found.flatten(1), expected, rtol=RTOL, atol=ATOL)

    def test_a_tied_weight_is_updated_once_for_all_its_calls(self) -> None:
        model = two_layers()
        model.blocks[1] = model.blocks[0]
        captured, masks, updates = update_of(model, [pixels()])
        assert len(updates) == len(masks) == 2
        inputs = torch.cat([item.flatten(0, -2) for item in linear_inputs(model, {"image": pixels()})["blocks.0.up.weight"]])
        dense = captured.parameter("blocks.0.up.weight").detach()
        expected = Reconstructor(inputs.mT @ inputs).reconstruct(dense, masks["blocks.0.up.weight"]).weight
        found = torch.where(masks["blocks.0.up.weight"], masks.updated_weight("blocks.0.up.weight", dense), 0.0)
        torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)
        module = set_values(captured, masks).module
        assert module.blocks[0].up.weight is module.blocks[1].up.weight  # type: ignore[index,union-attr]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_values_have_the_dtype_of_the_weight(self, dtype: torch.dtype) -> None:
        _, masks, updates = update_of(two_layers().to(dtype), [pixels().to(dtype)])
        assert {values.dtype for values in masks.new_values.values()} == {dtype}
        assert all(item.error < item.masked_error for item in updates)


class TestWhatIsLeftAlone:
    def test_inputs_that_cannot_be_used_are_said(self) -> None:
        for poison, reason in ((float("nan"), "its input holds NaN or infinity"), (0.0, "its input is zero in every")):
            model, batch = two_layers(), pixels()
            _, masks, updates = update_of(model, [batch * poison], example=batch)
            assert updates[0].left is not None
            assert updates[0].left.startswith(reason)
            assert any(item.subject == "blocks.0.up.weight" and reason in item.reason for item in masks.diagnostics)
            assert "blocks.0.up.weight" not in masks.new_values

    def test_nothing_pruned_runs_nothing(self) -> None:
        def refuse() -> list[Any]:
            raise AssertionError("the batches were asked for")

        masks, updates = updated(vlm_run(batches=refuse), vlm_masks(0.0), SparseGptOptions())
        assert (dict(masks.new_values), updates) == ({}, [])

    def test_a_layer_of_which_nothing_is_kept_is_zero_for_those_after_it(self) -> None:
        captured, masks, _ = update_of(two_layers(), [pixels()])
        gone = {**{name: masks[name] for name in masks}, "blocks.0.down.weight": torch.zeros(8, 16, dtype=torch.bool)}
        packed = {name: mfcompile.masks.PackedMask.pack(mask) for name, mask in gone.items()}
        run = PruningRun(captured, mfcompile.infer_regions(captured), 0.5, batches=lambda: [pixels()])
        found, updates = updated(run, replace(masks, packed=packed, new_values={}), SparseGptOptions())
        assert "blocks.0.down.weight" not in found.new_values
        model = two_layers()
        with torch.no_grad():
            model.get_parameter("blocks.0.down.weight").zero_()
        inputs = linear_inputs(model, {"image": pixels()})["blocks.1.up.weight"][0].flatten(0, 1)
        dense = captured.parameter("blocks.1.up.weight").detach()
        expected = Reconstructor(inputs.mT @ inputs).reconstruct(dense, gone["blocks.1.up.weight"]).masked_error
        (update,) = [item for item in updates if item.name == "blocks.1.up.weight"]
        assert update.masked_error == pytest.approx(expected, rel=1e-4)

    def test_values_of_another_update_stay_where_they_are_better(self) -> None:
        captured, masks, _ = update_of(two_layers(), [pixels()])
        name, inputs = "blocks.0.up.weight", pixels().flatten(0, 1).double()
        dense = captured.parameter(name).detach()
        best = torch.zeros_like(dense)
        for row, mask, values in zip(dense.double(), masks[name], best, strict=True):
            if bool(mask.any()):
                values[mask] = (
                    torch.linalg.lstsq(inputs[:, mask], (inputs @ row).unsqueeze(1), driver="gelsd").solution[:, 0].float()
                )
        run = PruningRun(captured, mfcompile.infer_regions(captured), 0.5, batches=lambda: [pixels()])
        given = replace(masks, new_values={name: best[masks[name]]})
        found, _ = updated(run, given, SparseGptOptions(damping=0.1))
        assert torch.equal(found.new_values[name], given.new_values[name])

    def test_the_users_model_and_random_numbers(self) -> None:
        model = tiny_vlm()
        before, state = fingerprint(model), torch.get_rng_state()
        parameters = dict(model.named_parameters())
        mfcompile.compile_pruned(model, vlm_batch(), update="sparsegpt", calibration=vlm_batches())
        assert fingerprint(model) == before
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert torch.equal(torch.get_rng_state(), state)

    def test_generators_of_devices_that_the_model_is_not_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, masks, seeds = vlm_run(), vlm_masks(), list[int]()
        monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
        assert updated(run, masks, SparseGptOptions())[0].new_values
        assert not seeds


def test_weights_that_some_batches_tell_apart_have_their_own_inputs() -> None:
    both, one = torch.rand(6, 9, 4) @ torch.rand(4, 4), -torch.rand(6, 9, 4)
    captured, masks, updates = update_of(gated(), [both, one])
    assert len(updates) == 4
    for name, inputs in (("first", torch.cat([both, one])), ("second", both)):
        flat, fqn = inputs.flatten(0, 1), f"items.0.{name}.weight"
        dense = captured.parameter(fqn).detach()
        expected = Reconstructor(flat.mT @ flat).reconstruct(dense, masks[fqn]).weight
        found = site_weight(set_values(captured, masks), next(site for site in sites_of(captured) if site.fqn == fqn))
        torch.testing.assert_close(torch.where(masks[fqn], found, 0.0), expected, rtol=RTOL, atol=ATOL)


def test_the_seed_decides_what_a_random_model_sees() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = two_layers()

        def forward(self, image: Tensor) -> Tensor:
            result: Tensor = self.layers(image + torch.rand_like(image))
            return result

    captured = mfcompile.capture(Noisy(), pixels())
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, sparsity=0.5, criterion="magnitude")
    digests = []
    for outside, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(outside)
        run = PruningRun(captured, regions, 0.5, seed=seed, batches=lambda: [pixels()])
        digests.append(updated(run, masks, SparseGptOptions())[0].digest())
    assert digests[0] == digests[1] != digests[2]
