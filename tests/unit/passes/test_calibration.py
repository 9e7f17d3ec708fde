"""Calibration: what is run, what is refused, and that the user's model comes out as it went in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import mfcompile
from mfcompile.errors import CalibrationError, InputError, PreconditionError
from mfcompile.passes import runner
from mfcompile.passes.calibration import repeated_weights
from mfcompile.passes.runner import fits_any_values
from tests.models import IMAGE_TOKENS, Batch, Mlp, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions

SAMPLES = [(6, 3), (5, 6), (2, 4)]


def batches() -> list[Batch]:
    return [vlm_batch(lengths, total=6, seed=seed) for seed, lengths in enumerate(SAMPLES)]


def calibrate(given: Any, **options: Any) -> mfcompile.CalibrationStatistics:
    return mfcompile.calibrate(vlm_captured(), given, regions=vlm_regions(), **options)


def sums(statistics: mfcompile.CalibrationStatistics) -> dict[str, Tensor]:
    return {name: site.sum_of_squares for name, site in statistics.sites.items()}


def assert_same(one: mfcompile.CalibrationStatistics, other: mfcompile.CalibrationStatistics, rtol: float = 1e-12) -> None:
    for name, expected in sums(one).items():
        torch.testing.assert_close(sums(other)[name], expected, rtol=rtol, atol=0.0, msg=name)
    assert [site.token_count for site in one.sites.values()] == [site.token_count for site in other.sites.values()]


class Samples(torch.utils.data.Dataset[Batch]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Batch:
        if index >= 6:
            raise IndexError
        return {name: tensor[index % 2] for name, tensor in batches()[index // 2].items()}


class Endless(IterableDataset[Batch]):
    """An iterable data set: its loader has a ``__len__`` that raises."""

    def __iter__(self) -> Iterator[Batch]:
        yield from (Samples()[index] for index in range(6))


SOURCES: dict[str, Callable[[], Any]] = {
    "generator": lambda: iter(batches()),
    "tuple of tuples": lambda: tuple(tuple(batch.values()) for batch in batches()),
    "other order of keys": lambda: [dict(reversed(batch.items())) for batch in batches()],
    "loader": lambda: DataLoader(Samples(), batch_size=2),
    "loader without a length": lambda: DataLoader(Endless(), batch_size=2),
}


@pytest.mark.parametrize("source", SOURCES)
def test_batches_come_from_anything_that_can_be_iterated(source: str) -> None:
    found = calibrate(SOURCES[source]())
    assert_same(calibrate(batches()), found)
    assert found.batch_count == 3
    assert found.source == "calibration batches"


def test_without_batches_the_example_inputs_stand_in() -> None:
    found = calibrate(None)
    assert_same(calibrate([vlm_captured().example_inputs]), found)
    assert (found.source, found.batch_count) == ("example inputs", 1)


def test_progress_knows_the_total_where_there_is_one() -> None:
    seen: list[tuple[int, int | None]] = []
    calibrate(batches(), progress=lambda done, total: seen.append((done, total)))
    calibrate(iter(batches()), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]


@pytest.mark.parametrize(("count", "used"), [(1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (99, 3)])
def test_num_samples_stops_after_the_batch_that_reaches_it(count: int, used: int) -> None:
    assert calibrate(batches(), num_samples=count).batch_count == used


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_num_samples_must_be_a_positive_integer(count: object) -> None:
    with pytest.raises(InputError, match="num_samples must be a positive integer or None, got"):
        calibrate(batches(), num_samples=count)


@pytest.mark.parametrize("given", [vlm_batch(), torch.ones(2, 3), "data", 7], ids=["mapping", "tensor", "text", "number"])
def test_one_batch_is_no_iterable_of_batches(given: object) -> None:
    with pytest.raises(InputError, match=f"calibration is a {type(given).__name__}: give an iterable of batches"):
        calibrate(given)


@pytest.mark.parametrize("empty", [[], iter(())])
def test_an_empty_calibration_set_is_refused(empty: object) -> None:
    with pytest.raises(CalibrationError, match="the calibration set is empty: no batch was given"):
        calibrate(empty)


def test_a_batch_that_does_not_fit_forward_names_its_index() -> None:
    with pytest.raises(CalibrationError, match=r"calibration batch 1 does not fit TinyVlm\.forward"):
        calibrate([vlm_batch(), {"pixels": torch.ones(2)}])


def test_a_batch_that_the_model_refuses_names_its_index_and_shapes() -> None:
    broken = {**vlm_batch(), "input_ids": torch.full((2, 6), 99)}
    with pytest.raises(CalibrationError, match=r"raised IndexError on calibration batch 1 \(pixel_values \(2, 3, 8, 8\), "):
        calibrate([vlm_batch(), broken])


def test_an_unknown_observer_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="observe='hooks' is unknown; choose auto, graph or module"):
        calibrate(batches(), observe="hooks")


def test_a_batch_of_other_shapes_goes_through_the_module() -> None:
    assert calibrate([vlm_batch()]).observed_by == "graph"
    assert calibrate([vlm_batch(), vlm_batch((3,))]).observed_by == "graph+module"
    with pytest.raises(CalibrationError, match=r"batch 1 does not fit the graph.*Use observe='auto'"):
        calibrate([vlm_batch(), vlm_batch((3,))], observe="graph")


@pytest.mark.parametrize("how", ["graph", "module"])
def test_nan_in_a_token_names_the_site_and_the_feature(how: str) -> None:
    broken = vlm_batch()
    broken["pixel_values"][1, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the input of vision\.0\.attention\.query\.weight holds NaN.*in feature 0"):
        calibrate([vlm_batch(), broken], observe=how)


class LeakyVlm(nn.Module):
    """Rows of padding come out as NaN, and stay in their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.blocks = TwoLayers().blocks

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.embedding(input_ids) / attention_mask[..., None]
        states = states - states + self.embedding(input_ids) * (states * 0 + 1)
        for block in self.blocks:
            states = block(states)
        result: Tensor = states
        return result


@pytest.mark.parametrize("how", ["graph", "module"])
def test_nan_in_padding_does_not_leak(how: str) -> None:
    torch.manual_seed(0)
    model = LeakyVlm().eval()
    full = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    padded = {**full, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    captured = mfcompile.capture(model, full)
    with torch.no_grad():
        assert torch.isnan(model(**padded)).any()
    found = mfcompile.calibrate(captured, [padded], observe=how)
    first = found.sites["blocks.0.up.weight"]
    assert (first.token_count, first.padding_count) == (6, 2)
    expected = model.embedding(padded["input_ids"])[padded["attention_mask"] == 1].detach().double().square().sum(0)
    torch.testing.assert_close(first.sum_of_squares, expected, rtol=1e-6, atol=0.0)


def test_as_many_text_tokens_as_image_tokens() -> None:
    """The padding mask has the shape of image rows: only what it speaks of may be filtered."""
    example = vlm_batch((IMAGE_TOKENS, 2), total=IMAGE_TOKENS)
    captured = mfcompile.capture(tiny_vlm(), example)
    found = mfcompile.calibrate(captured, [example])
    for name, site in found.sites.items():
        reads_image = name.startswith("vision") or ".cross.key" in name or ".cross.value" in name
        assert (site.token_count, site.padding_count) == ((8, 0) if reads_image else (6, 2)), name


def test_a_padding_mask_may_be_named() -> None:
    assert calibrate([vlm_batch()], padding_mask="attention_mask").padding_masks == ("attention_mask",)
    with pytest.raises(InputError, match=r"padding_mask='mask' is no \(batch, length\) input.*attention_mask \(2, 6\)"):
        calibrate([vlm_batch()], padding_mask="mask")


class TwoHeads(nn.Module):
    """A stack of blocks per modality; the text one runs where text is given."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read = TwoLayers(), TwoLayers()

    def forward(self, image: Tensor, text: Tensor | None = None) -> list[Tensor]:
        return [self.look(image)] + ([] if text is None else [self.read(text)])


def test_a_region_without_a_token_is_refused() -> None:
    image, text = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    captured = mfcompile.capture(TwoHeads(), {"image": image, "text": text})
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision", "text": "text"})
    with pytest.raises(CalibrationError, match=r"'text' received no calibration token at any of its 4 sites .*region:text"):
        mfcompile.calibrate(captured, [{"image": image}, {"image": image, "text": text[:, :0]}], regions=regions)
    dense = mfcompile.infer_regions(captured, modalities={"image": "vision", "text": "text"}, ignore=["region:text"])
    assert len(mfcompile.calibrate(captured, [{"image": image}], regions=dense).sites) == 4


class Sometimes(nn.Module):
    """The second block runs for large images only."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, image: Tensor) -> Tensor:
        first: Tensor = self.blocks[0](image)
        return self.blocks[1](first) if image.shape[1] > 3 else first


def test_a_site_without_a_token_in_a_region_with_some_is_said() -> None:
    captured = mfcompile.capture(Sometimes(), torch.randn(2, 5, 4))
    found = mfcompile.calibrate(captured, [torch.randn(2, 3, 4)])
    assert [str(item) for item in found.diagnostics] == [
        f"blocks.1.{name}.weight: it received no calibration token: magnitude ranks its weights" for name in ("up", "down")
    ]


class Picky(nn.Module):
    """Its graph is fixed to values: a number is read from the input, or a size follows from values."""

    def __init__(self, pick: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers, self.pick = TwoLayers(), pick

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layers(self.pick(image))
        return result


PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda image: image[: int((image[:, 0, 0] > 0).sum())],
    "tolist": lambda image: torch.stack([image[i] for i, x in enumerate(image[:, 0, 0].tolist()) if x > 0]),
    "bool index": lambda image: image[image[:, 0, 0] > 0],
    "nonzero": lambda image: image.index_select(0, (image[:, 0, 0] > 0).nonzero()[:, 0]),
    "numpy": lambda image: image[torch.from_numpy(image[:, 0, 0].numpy() > 0)],
}


@pytest.mark.parametrize("name", PICKS)
def test_a_graph_that_is_fixed_to_values_is_not_used_for_others(name: str) -> None:
    example = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    example[:, 0, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    captured = mfcompile.capture(Picky(PICKS[name]), example)
    assert not fits_any_values(captured)
    other = example.clone()
    other[:, 0, 0] = torch.tensor([1.0, 1.0, 1.0, -1.0])
    found = mfcompile.calibrate(captured, [other])
    assert found.observed_by == "module"
    assert found.sites["layers.blocks.0.up.weight"].token_count == 9


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest()


class Stateful(nn.Module):
    """Counts its calls, clamps a parameter, fills a queue, keeps a cache, and scales the batch in place."""

    calls: Tensor
    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = TwoLayers()
        self.temperature = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(2, 3, 4))
        self.cache: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        self.temperature.data.clamp_(0.1, 1.0)
        image.mul_(2.0)
        self.queue = self.queue.roll(1, 0) + image
        self.cache.append(image)
        result: Tensor = self.layers(image) * self.temperature * self.calls + self.queue
        return result


@pytest.mark.parametrize("how", ["graph", "module"])
def test_the_model_and_the_batches_come_out_as_they_went_in(how: str) -> None:
    torch.manual_seed(0)
    model, example = Stateful().train(), torch.randn(2, 3, 4)
    model.layers.eval()
    before, attributes, given = digest(model), {id(item): set(vars(item)) for item in model.modules()}, example.clone()
    training = [item.training for item in model.modules()]
    captured = mfcompile.capture(model, example)
    found = mfcompile.calibrate(captured, [example, example], observe=how)
    assert digest(model) == before
    assert torch.equal(example, given)
    assert [item.training for item in model.modules()] == training
    assert {id(item): set(vars(item)) for item in model.modules()} == attributes
    assert not model.cache
    assert not any(item._forward_hooks or item._forward_pre_hooks for item in model.modules())
    # Both batches start from the same state: the second counts as much as the first.
    once = mfcompile.calibrate(captured, [example], observe=how)
    for name, site in found.sites.items():
        torch.testing.assert_close(site.sum_of_squares, 2 * once.sites[name].sum_of_squares, rtol=1e-12, atol=0.0)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.dropout = TwoLayers(), nn.Dropout(0.5)

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layers(self.dropout(image))
        return result


@pytest.mark.parametrize("how", ["graph", "module"])
def test_a_model_in_training_is_calibrated_as_in_eval_mode(how: str) -> None:
    torch.manual_seed(0)
    model, image = Dropping().train(), torch.randn(2, 3, 4)
    found = mfcompile.calibrate(mfcompile.capture(model, image), [image], observe=how)
    site = found.sites["layers.blocks.0.up.weight"]
    torch.testing.assert_close(site.sum_of_squares, image.double().square().sum((0, 1)), rtol=1e-6, atol=0.0)


class Tied(nn.Module):
    """Two stacks that share their first weight."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read = TwoLayers(), TwoLayers()
        self.read.blocks[0].up.weight = self.look.blocks[0].up.weight  # type: ignore[union-attr]

    def forward(self, image: Tensor, text: Tensor) -> list[Tensor]:
        return [self.look(image), self.read(text)]


@pytest.mark.parametrize("how", ["graph", "module"])
def test_a_tied_weight_counts_what_reaches_it_under_all_its_names(how: str) -> None:
    torch.manual_seed(0)
    model, image, text = Tied(), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    captured = mfcompile.capture(model, (image, text))
    regions = mfcompile.infer_regions(captured, modalities={"image": "vision", "text": "text"})
    assert repeated_weights(regions) == {"look.blocks.0.up.weight"}
    found = mfcompile.calibrate(captured, [(image, text)], regions=regions, observe=how)
    assert "read.blocks.0.up.weight" not in found.sites
    site = found.sites["look.blocks.0.up.weight"]
    expected = torch.cat([image, text], 1).double().square().sum((0, 1))
    torch.testing.assert_close(site.sum_of_squares, expected, rtol=1e-6, atol=0.0)
    assert site.token_count == 16


def test_the_graph_is_observed_and_the_module_is_copied_only_where_a_batch_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(runner, name)

        def call(*args: Any) -> Any:
            done.append(name)
            return original(*args)

        return call

    for name in ("run_transform", "share_weights_copy"):
        monkeypatch.setattr(runner, name, counted(name))
    for given, expected in (
        ([vlm_batch()], ["run_transform"]),
        ([vlm_batch((6, 3, 5))], ["share_weights_copy"]),
        ([vlm_batch(), vlm_batch((6, 3, 5)), vlm_batch()], ["run_transform", "share_weights_copy"]),
    ):
        done.clear()
        calibrate(given)
        assert sorted(done) == expected


def test_regions_of_another_graph_are_refused_whatever_is_run() -> None:
    deeper = mfcompile.infer_regions(mfcompile.capture(tiny_vlm(layers=3), vlm_batch()))
    other = replace(vlm_regions(), evidence=deeper.evidence)
    for batch in (vlm_batch(), vlm_batch((6, 3, 5))):
        with pytest.raises(PreconditionError, match="made for another graph"):
            mfcompile.calibrate(vlm_captured(), [batch], regions=other)
