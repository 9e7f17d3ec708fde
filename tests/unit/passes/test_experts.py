"""Experts held as 3-D tensors: each is a site of its own, whose calibration tokens are those that were routed to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mfcompile
from mfcompile.masks import MaskSet
from mfcompile.passes.scores import score_weights
from mfcompile.statistics import CalibrationStatistics
from tests.zoo.renaming import rename

WIDTH, INNER, EXPERTS, CHOSEN = 8, 16, 4, 2  # _grouped_mm wants rows of 16 bytes
WAYS = ("loop", "grouped", "looked up", "batched")

# Sums of squares in float64 of activations that differ in the last bits of float32.
RTOL = 1e-5
# The same activations, reduced alike.
RTOL_OF_OBSERVERS = 1e-12


class Experts(nn.Module):
    """Two matrices per expert, and four ways to bring tokens to them."""

    up: Tensor
    down: Tensor

    def __init__(self, way: str, is_turned: bool) -> None:
        super().__init__()
        shapes = {"up": (INNER, WIDTH), "down": (WIDTH, INNER)}
        for name, (rows, columns) in shapes.items():
            values = torch.randn(EXPERTS, rows, columns) / 3
            self.register_parameter(name, nn.Parameter(values.mT.contiguous() if is_turned else values))
        self.way, self.is_turned = way, is_turned
        self.seen: list[tuple[str, int, Tensor]] | None = None

    def forward(self, tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        ways = {"loop": self.loop, "grouped": self.grouped, "looked up": self.looked_up, "batched": self.batched}
        return ways[self.way](tokens, index, gates)

    def matrices(self, name: str) -> Tensor:
        """(experts, in, out)."""
        stored: Tensor = getattr(self, name)
        return stored if self.is_turned else stored.transpose(1, 2)

    def loop(self, tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        result = torch.zeros_like(tokens)
        for expert in torch.unique(index):
            rows, place = torch.where(index == expert)
            hidden = self.apply_one("up", int(expert), tokens[rows]).relu()
            hidden = self.apply_one("down", int(expert), hidden)
            result.index_add_(0, rows, hidden * gates[rows, place, None])
        return result

    def apply_one(self, name: str, expert: int, rows: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen.append((name, expert, rows.detach().clone()))
        stored: Tensor = getattr(self, name)
        return rows @ stored[expert] if self.is_turned else F.linear(rows, stored[expert])

    def grouped(self, tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        order = index.reshape(-1).argsort(stable=True)
        rows = tokens[order // CHOSEN]
        ends = (index.reshape(-1, 1) == torch.arange(EXPERTS)).sum(0).cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(rows, self.matrices("up"), offs=ends).relu()
        hidden = F.grouped_mm(hidden, self.matrices("down"), offs=ends) * gates.reshape(-1)[order, None]
        return hidden[order.argsort()].view(*index.shape, WIDTH).sum(1)

    def looked_up(self, tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        rows, expert = tokens.repeat_interleave(CHOSEN, dim=0), index.reshape(-1)
        if self.is_turned:
            hidden = torch.bmm(rows.unsqueeze(1), self.up[expert]).squeeze(1).relu()
            hidden = torch.bmm(hidden.unsqueeze(1), torch.index_select(self.down, 0, expert)).squeeze(1)
        else:
            hidden = torch.bmm(self.up[expert], rows.unsqueeze(-1)).squeeze(-1).relu()
            hidden = torch.einsum("sh,soh->so", hidden, self.down[expert])
        return (hidden * gates.reshape(-1, 1)).view(*index.shape, WIDTH).sum(1)

    def batched(self, tokens: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        chosen = (index[:, :, None] == torch.arange(EXPERTS)).float()
        rows = tokens * chosen.sum(1).mT[:, :, None]
        hidden = torch.bmm(rows, self.matrices("up")).relu()
        hidden = torch.einsum("eth,eho->eto", hidden, self.matrices("down"))
        return torch.einsum("eto,te->to", hidden, (gates[:, :, None] * chosen).sum(1))


class Layer(nn.Module):
    def __init__(self, way: str, is_turned: bool) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), Experts(way, is_turned)

    def forward(self, states: Tensor) -> Tensor:
        flat = F.layer_norm(states, (WIDTH,)).view(-1, WIDTH)
        gates, index = self.router(flat).softmax(-1).topk(CHOSEN)
        mixed: Tensor = self.experts(flat, index, gates)
        return states + mixed.view_as(states)


class Mixture(nn.Module):
    def __init__(self, way: str, is_turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(way, is_turned) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return image


def image(seed: int = 1, length: int = 5) -> Tensor:
    return torch.randn(3, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def statistics_of(model: nn.Module, observe: str = "auto", batches: list[Any] | None = None) -> CalibrationStatistics:
    captured = mfcompile.capture(model, image())
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    return mfcompile.calibrate(captured, batches, regions=regions, observe=observe)


def looped(length: int = 5) -> dict[str, list[Tensor]]:
    """Site -> the rows that reached it, taken down by the loop itself."""
    model = Mixture("loop").eval()
    for layer in model.layers:
        layer.experts.seen = []  # type: ignore[union-attr]
    with torch.no_grad():
        model(image(length=length))
    found: dict[str, list[Tensor]] = {}
    for number, layer in enumerate(model.layers):
        for name, expert, rows in layer.experts.seen:  # type: ignore[union-attr]
            found.setdefault(f"layers.{number}.experts.{name}[{expert}]", []).append(rows)
    return found


@pytest.mark.parametrize("is_turned", [False, True], ids=["out first", "in first"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("observe", ["module", "auto"])
def test_every_way_to_run_experts_gives_the_rows_that_reached_them(way: str, is_turned: bool, observe: str) -> None:
    found = statistics_of(Mixture(way, is_turned), observe)
    if observe == "auto":
        assert found.observed_by == ("module" if way == "loop" else "graph")  # a loop bakes the numbers of its experts
    names = [f"layers.{layer}.experts.{name}[{expert}]" for layer in (0, 1) for name in ("up", "down") for expert in range(4)]
    assert [name for name in found.sites if "experts" in name] == names
    for name in names:
        rows = [item.double().numpy() for item in looped().get(name, [])]
        expected = sum((item**2).sum(0) for item in rows)
        np.testing.assert_allclose(found.sites[name].sum_of_squares.numpy(), expected, rtol=RTOL, err_msg=name)
        if way != "batched" or "up" in name:  # a hidden row that relu put to zero all over is not told from one left out
            assert found.sites[name].token_count == sum(len(item) for item in rows)
        assert found.sites[name].sample_count == 3


@pytest.mark.parametrize("way", [way for way in WAYS if way != "loop"])
def test_graph_and_module_agree(way: str) -> None:
    graph, module = statistics_of(Mixture(way), "graph"), statistics_of(Mixture(way), "module")
    for name, site in graph.sites.items():
        other = module.sites[name]
        torch.testing.assert_close(site.sum_of_squares, other.sum_of_squares, rtol=RTOL_OF_OBSERVERS, atol=0)
        assert (site.token_count, site.sample_count) == (other.token_count, other.sample_count)


def test_batches_add_up() -> None:
    both = statistics_of(Mixture("grouped"), "module", [image(1), image(2, 7)])
    parts = [statistics_of(Mixture("grouped"), "module", [item]) for item in (image(1), image(2, 7))]
    for name, site in both.sites.items():
        total = sum(part.sites[name].sum_of_squares for part in parts)
        torch.testing.assert_close(site.sum_of_squares, total, rtol=RTOL_OF_OBSERVERS, atol=0)
        assert site.sample_count == 6


class TestOneExpertIsStarved:
    """The router of the first layer never chooses the last expert."""

    @pytest.fixture(params=["loop", "grouped", "looked up"])
    def model(self, request: pytest.FixtureRequest) -> Mixture:
        model = Mixture(request.param).eval()
        with torch.no_grad():
            model.get_parameter("layers.0.router.bias")[3] = -100
        return model

    def test_it_is_said(self, model: Mixture) -> None:
        found = statistics_of(model)
        assert [str(item) for item in found.diagnostics if item.subject.startswith("layers.0")] == [
            "layers.0.experts.up: 1 of its 4 experts received no calibration token (3): magnitude ranks theirs",
            "layers.0.experts.down: 1 of its 4 experts received no calibration token (3): magnitude ranks theirs",
        ]

    def test_magnitude_ranks_it_and_scores_rank_the_others(self, model: Mixture) -> None:
        captured = mfcompile.capture(model, image())
        regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
        statistics = mfcompile.calibrate(captured, regions=regions)
        masks = mfcompile.select_masks(captured, regions, statistics, sparsity=0.5)
        weight = captured.parameter("layers.0.experts.up").detach()
        for expert in range(EXPERTS):
            kept = masks["layers.0.experts.up"][expert]
            norm = statistics.sites[f"layers.0.experts.up[{expert}]"].input_norm()
            score = weight[expert].abs() if expert == 3 else score_weights(weight[expert], norm)
            assert 0 < int(kept.sum()) < kept.numel()
            assert score[kept].min() > score[~kept].max(), expert


def compiled(way: str, is_turned: bool = False) -> mfcompile.CompiledModel:
    return mfcompile.compile_pruned(Mixture(way, is_turned), image(), sparsity=0.5, modalities={"image": "vision"})


def test_the_implementation_does_not_change_the_masks() -> None:
    digests = {compiled(way).masks.digest() for way in WAYS}
    assert len(digests) == 1


def test_the_storage_order_does_not_change_the_masks() -> None:
    plain, turned = compiled("grouped").masks, compiled("grouped", is_turned=True).masks
    assert all(torch.equal(plain[fqn], turned[fqn].mT if "experts" in fqn else turned[fqn]) for fqn in plain)


@pytest.mark.parametrize("way", WAYS)
def test_masked_graph_and_masked_module_and_zeroed_weights_are_one(way: str) -> None:
    found = compiled(way)
    zeroed = Mixture(way).eval()
    with torch.no_grad():
        for fqn, mask in found.masks.items():
            zeroed.get_parameter(fqn).mul_(mask)
        expected = zeroed(image())
        assert torch.equal(found.module(image()), expected)
        assert torch.equal(found.captured.graph_module(image())[0], expected)
        assert torch.equal(found.strip()(image()), expected)


def test_masks_keep_their_three_dimensions_in_a_file(tmp_path: Path) -> None:
    masks = compiled("loop").masks
    loaded = MaskSet.load(masks.save(tmp_path / "masks.safetensors"))
    assert loaded == masks
    assert loaded["layers.0.experts.up"].shape == (EXPERTS, INNER, WIDTH)


def test_the_report_counts_the_tokens_of_every_expert() -> None:
    rows = {row["name"]: row for row in compiled("grouped").report["sites"]}
    tokens = [rows[f"layers.0.experts.up[{expert}]"]["tokens"] for expert in range(EXPERTS)]
    assert sum(tokens) == 15 * CHOSEN
    assert sum(row["kept"] for row in rows.values()) == compiled("grouped").masks.kept_count


@pytest.mark.parametrize("is_turned", [False, True], ids=["out first", "in first"])
@pytest.mark.parametrize("way", ["looked up", "batched"])
def test_packed_experts_run_in_onnxruntime(way: str, is_turned: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    found = compiled(way, is_turned)
    artifact = found.export_onnx(tmp_path / "model.onnx")
    packed = {item.fqn for item in artifact.encodings}
    assert {fqn for fqn in found.masks if "experts" in fqn} <= packed
    assert found.verify(artifact).passed


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_implementations_of_transformers_give_the_same(implementation: str) -> None:
    transformers = pytest.importorskip("transformers")

    def build(name: str) -> tuple[mfcompile.RegionMap, CalibrationStatistics, MaskSet]:
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        )  # fmt: skip
        config._experts_implementation = name
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config).eval()
        assert model.config._experts_implementation == name
        ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(2))
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [6]])).long()}
        found = mfcompile.compile_pruned(model, inputs, sparsity=0.5)
        return found.regions, found.statistics, found.masks

    expected, found = build("eager"), build(implementation)
    assert [site.name for site in found[0].pruned_sites] == [site.name for site in expected[0].pruned_sites]
    assert len([site for site in found[0].pruned_sites if site.expert is not None]) == 2 * 2 * 4
    for name, site in found[1].sites.items():
        other = expected[1].sites[name]
        torch.testing.assert_close(site.sum_of_squares, other.sum_of_squares, rtol=RTOL, atol=0)
        assert (site.token_count, site.padding_count, site.sample_count) == (
            other.token_count, other.padding_count, other.sample_count
        ), name  # fmt: skip
    assert sum(found[1].sites[f"model.layers.0.mlp.experts.down_proj[{expert}]"].padding_count for expert in range(4)) == 8
    assert found[2] == expected[2]
    assert found[1].diagnostics == expected[1].diagnostics == ()


@pytest.mark.parametrize("way", WAYS)
def test_names_decide_nothing(way: str) -> None:
    model = Mixture(way)
    names = rename(model)
    found = mfcompile.compile_pruned(model, image(), sparsity=0.5, modalities={"image": "vision"})
    expected = compiled(way)
    assert [names[site.fqn] for site in found.regions.pruned_sites] == [site.fqn for site in expected.regions.pruned_sites]
    assert {names[fqn] for fqn in found.masks} == set(expected.masks)
    assert all(torch.equal(found.masks[fqn], expected.masks[names[fqn]]) for fqn in found.masks)


def test_experts_that_the_run_did_not_call_are_listed() -> None:
    """A second stack of experts, for inputs that the example does not hold."""

    class Two(Mixture):
        def __init__(self) -> None:
            super().__init__("grouped")
            self.others = nn.ModuleList(Layer("grouped", is_turned=False) for _ in range(2))

    captured = mfcompile.capture(Two(), image())
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision"})
    reasons = {site.fqn: site.skipped for site in regions.sites if site.fqn.startswith("others")}
    assert reasons == {
        f"others.{layer}.{name}": "no call of the captured run uses it"
        for layer in (0, 1)
        for name in ("router.weight", "experts.up", "experts.down")
    }
