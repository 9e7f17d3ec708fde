"""Weights with several names or several calls: tied, shared between modalities, applied again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from tests.zoo.parts import VOCAB, WIDTH, Attention, FeedForward, Patches, Words

# Float32 sums of a few dozen squares, added in another order.
RTOL = 1e-6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ff = Attention(), FeedForward()

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.attention(states)
        result: Tensor = states + self.ff(states)
        return result


class Model(nn.Module):
    """Two towers; what they share is set up from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.words = Patches(), Words()
        self.vision, self.text = (nn.ModuleList(Layer() for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen, read = self.patches(image), self.words(ids)
        for layer in self.vision:
            seen = layer(seen)
        for layer in self.text:
            read = layer(read)
        return seen, self.head(read)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(3, 3, 8, 8, generator=generator),
        "ids": torch.randint(2, VOCAB, (3, 6), generator=generator),
    }


def inferred(model: nn.Module) -> tuple[mfcompile.CapturedGraph, mfcompile.RegionMap]:
    captured = mfcompile.capture(model, inputs())
    return captured, mfcompile.infer_regions(captured)


class TestTiedAcrossRegions:
    """The second text layer holds the second image layer's feed-forward weight under a name of its own."""

    @pytest.fixture
    def model(self) -> Any:
        model = Model()
        model.text[1].ff[1].weight = model.vision[1].ff[1].weight  # type: ignore[index, union-attr]
        return model

    def test_it_is_one_site_that_names_both(self, model: nn.Module) -> None:
        _, regions = inferred(model)
        (site,) = [site for site in regions.sites if "1.ff.1.weight" in site.name]
        assert (site.fqn, site.tied_with) == ("vision.1.ff.1.weight", ("text.1.ff.1.weight",))
        assert (site.is_shared, site.region, site.skipped) == (True, "fusion", None)
        assert f"{site.fqn}: called with different modalities; it is pruned with fusion" in map(str, regions.diagnostics)

    @pytest.mark.parametrize("observe", ["graph", "module"])
    def test_its_statistics_are_those_of_both_calls(self, model: nn.Module, observe: str) -> None:
        reaching: list[Tensor] = []
        for tower in (model.vision, model.text):
            tower[1].ff[1].register_forward_pre_hook(lambda _, args: reaching.append(args[0]))  # type: ignore[index, union-attr]
        with torch.no_grad():
            model.eval()(**inputs())
        expected = sum((rows.double().reshape(-1, WIDTH) ** 2).sum(0) for rows in reaching)
        captured, regions = inferred(model)
        found = mfcompile.calibrate(captured, regions=regions, observe=observe).sites["vision.1.ff.1.weight"]
        torch.testing.assert_close(found.sum_of_squares, expected, rtol=RTOL, atol=0)
        assert found.token_count == 3 * 4 + 3 * 6

    def test_one_mask_holds_under_both_names(self, model: nn.Module) -> None:
        compiled = mfcompile.compile_pruned(model, inputs(), sparsity=0.5)
        assert "text.1.ff.1.weight" not in compiled.masks
        weights = [tower[1].ff[1].weight for tower in (compiled.module.vision, compiled.module.text)]  # type: ignore[index, union-attr]
        assert torch.equal(*weights)
        assert torch.equal(weights[0] == 0, ~compiled.masks["vision.1.ff.1.weight"])


def test_a_head_tied_to_the_words_stays_dense_and_says_so() -> None:
    model = Model()
    model.head.weight = model.words.table.weight
    captured = mfcompile.capture(model, inputs())
    for targets in (None, ["head", "text"]):
        regions = mfcompile.infer_regions(captured, targets=targets)
        (site,) = [site for site in regions.sites if site.fqn == "words.table.weight"]
        assert site.tied_with == ("head.weight",)
        assert (site.skipped or "").startswith("it is tied to an embedding table (embedding")


class TestOneModuleForBoth:
    """One stack reads the image, then the text, then both: shared, and none of them alone."""

    class Shared(Model):
        def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            seen, read = self.patches(image), self.words(ids)
            for layer in self.vision:
                seen = layer(seen)
            for layer in self.vision:
                read = layer(read)
            return seen, self.head(read)

    def test_region_and_calls(self) -> None:
        _, regions = inferred(self.Shared())
        uses = regions.evidence["vision.0.ff.1.weight"]
        assert [set(use.label) for use in uses] == [{"vision"}, {"text"}]
        sites = [site for site in regions.pruned_sites if site.fqn.startswith("vision")]
        assert len(sites) == 12
        assert {(site.region, site.is_shared) for site in sites} == {("fusion", True)}
        reasons = {site.skipped for site in regions.sites if site.fqn.startswith("text")}
        assert reasons == {"no call of the captured run uses it"}

    @pytest.mark.parametrize("observe", ["graph", "module"])
    def test_statistics_add_up_over_the_calls(self, observe: str) -> None:
        model = self.Shared().eval()
        captured, regions = inferred(model)
        found = mfcompile.calibrate(captured, regions=regions, observe=observe).sites["vision.0.attention.q.weight"]
        with torch.no_grad():
            given = inputs()
            rows = [model.patches(given["image"]).reshape(-1, WIDTH), model.words(given["ids"]).reshape(-1, WIDTH)]
        expected = sum((item.double() ** 2).sum(0) for item in rows)
        torch.testing.assert_close(found.sum_of_squares, expected, rtol=RTOL, atol=0)
        assert found.token_count == 3 * 4 + 3 * 6
