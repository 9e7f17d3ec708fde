"""Calibration that is done once: what finds an entry, what must not, and that nothing but time depends on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

import mfcompile
from mfcompile import statistics_cache
from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes import cached_calibration, calibration
from mfcompile.passes.cached_calibration import CachedCalibration, calibrate_cached
from tests.models import Batch, TwoLayers, tiny_vlm, vlm_batch, vlm_captured, vlm_regions

Make = Callable[[], Any]


class Listed(Dataset[Batch]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return batches(self.count)[index]


def loader(count: int = 2, **options: Any) -> DataLoader[Batch]:
    return DataLoader(Listed(count), batch_size=None, **options)


def batches(count: int = 2) -> list[Batch]:
    return [vlm_batch((6, 3), seed=seed) for seed in range(count)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the model was calibrated: grows by one entry each time."""
    found: list[int] = []
    calibrate = calibration.calibrate

    def counted(*args: Any, **options: Any) -> mfcompile.CalibrationStatistics:
        found.append(1)
        return calibrate(*args, **options)

    monkeypatch.setattr(cached_calibration, "calibrate", counted)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., CachedCalibration]:
    """``calibrate_cached`` of the tiny model, in a cache of its own."""

    def calibrated(given: Any, **options: Any) -> CachedCalibration:
        captured, regions = options.pop("captured", vlm_captured()), options.pop("regions", vlm_regions())
        return calibrate_cached(captured, regions, given, **{"cache_dir": tmp_path, **options})

    return calibrated


def assert_equal(one: mfcompile.CalibrationStatistics, other: mfcompile.CalibrationStatistics) -> None:
    assert replace(one, sites={}) == replace(other, sites={})
    assert list(one.sites) == list(other.sites)
    for name, site in one.sites.items():
        assert torch.equal(site.sum_of_squares, other.sites[name].sum_of_squares)
        assert list(vars(site).values())[1:] == list(vars(other.sites[name]).values())[1:]


def test_the_second_time_no_forward_pass_is_run(run: Callable[..., CachedCalibration], runs: list[int]) -> None:
    first = run(batches())
    second = run(batches())
    assert (first.is_reused, second.is_reused, len(runs)) == (False, True, 1)
    assert first.entry == second.entry
    assert first.entry is not None
    assert first.entry.is_file()
    assert_equal(first.statistics, second.statistics)
    plain = mfcompile.calibrate(vlm_captured(), batches(), regions=vlm_regions())
    assert_equal(replace(first.statistics, fingerprint=""), plain)
    assert first.statistics.fingerprint == mfcompile.select_masks(vlm_captured(), vlm_regions(), plain).fingerprint
    assert not first.diagnostics + second.diagnostics


def test_another_capture_of_the_same_model_finds_it(run: Callable[..., CachedCalibration]) -> None:
    run(batches())
    captured = mfcompile.capture(tiny_vlm(), vlm_batch())
    assert run(batches(), captured=captured, regions=mfcompile.infer_regions(captured)).is_reused


def test_autocast_around_the_call_is_another_calibration(run: Callable[..., CachedCalibration]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        first = run(batches())
        assert run(batches()).is_reused
    assert not run(batches()).is_reused
    assert first.is_reused is False


REREAD: dict[str, Make] = {
    "a tuple of tuples": lambda: tuple(tuple(batch.values()) for batch in batches()),
    "a loader": lambda: loader(),
    "a function": lambda: batches,
    "a generator function": lambda: lambda: iter(batches()),
    "a function that gives a loader": lambda: lambda: loader(),
}


@pytest.mark.parametrize("name", REREAD)
def test_what_can_be_read_twice_is_looked_up(name: str, run: Callable[..., CachedCalibration]) -> None:
    given = REREAD[name]()
    if name == "a tuple of tuples":  # another way to pass the arguments is another key
        run(given)
    else:
        run(batches())
    found = run(given)
    assert found.is_reused
    assert not found.diagnostics


class Shared:
    """Its iterator is one and the same, however often it is asked for."""

    def __init__(self) -> None:
        self.batches = iter(batches())

    def __iter__(self) -> Iterator[Batch]:
        return self.batches


ONCE: dict[str, Make] = {
    "a generator": lambda: (batch for batch in batches()),
    "an iterable with one iterator": Shared,
    "a function that gives one iterator": lambda: iter(batches()).__iter__,
}


@pytest.mark.parametrize("name", ONCE)
def test_what_can_be_read_once_is_calibrated_and_kept(name: str, run: Callable[..., CachedCalibration]) -> None:
    first = run(ONCE[name]())
    assert not first.diagnostics
    second = run(ONCE[name]())
    assert not second.is_reused
    assert second.entry == first.entry
    assert [str(item) for item in second.diagnostics] == [
        "calibration cache: the batches can be read only once, so that they were not looked up"
    ]
    assert_equal(first.statistics, second.statistics)
    assert run(batches()).is_reused


class Vanishing:
    """A stream: every reading takes what is left."""

    def __init__(self) -> None:
        self.left = batches()

    def __iter__(self) -> Iterator[Batch]:
        while self.left:
            yield self.left.pop()


def test_a_stream_that_is_used_up_by_the_look_up_is_said(run: Callable[..., CachedCalibration]) -> None:
    run(batches())
    with pytest.raises(CalibrationError, match="gone when they were read for the second time"):
        run(Vanishing())


def test_the_example_inputs_have_an_entry_of_their_own(run: Callable[..., CachedCalibration]) -> None:
    assert not run([vlm_captured().example_inputs]).is_reused
    first, second = run(None), run(None)
    assert (first.is_reused, second.is_reused, second.statistics.source) == (False, True, "example inputs")
    assert_equal(first.statistics, second.statistics)


def changed_weight() -> mfcompile.CapturedGraph:
    model = tiny_vlm()
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    return mfcompile.capture(model, vlm_batch())


def changed_code() -> mfcompile.CapturedGraph:
    """The same weights, another function of them."""
    model = tiny_vlm()
    for layer in model.vision:
        layer.forward = lambda states, bias=None, layer=layer: (
            states + layer.down(F.gelu(layer.up(layer.norms[1](states + layer.attention(states, states)))))
        )
    return mfcompile.capture(model, vlm_batch())


@pytest.mark.parametrize("change", [changed_weight, changed_code])
def test_another_model_finds_nothing(
    change: Callable[[], mfcompile.CapturedGraph], run: Callable[..., CachedCalibration]
) -> None:
    run(batches())
    captured = change()
    assert not run(batches(), captured=captured, regions=mfcompile.infer_regions(captured)).is_reused


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 2},
        {"observe": "module"},
        {"regions": mfcompile.infer_regions(vlm_captured(), ignore=["region:text"])},
        {"regions": mfcompile.infer_regions(vlm_captured(), modalities={"attention_mask": "text"})},
    ],
)
def test_other_options_find_nothing(options: dict[str, Any], run: Callable[..., CachedCalibration]) -> None:
    run(batches())
    assert not run(batches(), **options).is_reused
    assert run(batches(), **options).is_reused


@pytest.mark.parametrize("facts", ["mfcompile", "torch", "format"])
def test_another_version_finds_nothing(
    facts: str, run: Callable[..., CachedCalibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(batches())
    if facts == "torch":
        monkeypatch.setattr(torch, "__version__", "0.0.1")
    else:
        monkeypatch.setattr(cached_calibration, "__version__" if facts == "mfcompile" else "FORMAT_VERSION", "0.0.1")
    assert not run(batches()).is_reused


def test_only_the_samples_that_are_used_count(run: Callable[..., CachedCalibration]) -> None:
    run(batches(3), num_samples=3)
    other = [*batches(2), vlm_batch((6, 3), seed=77)]
    assert run(other, num_samples=3).is_reused
    assert not run(other[1:], num_samples=3).is_reused


class Scaled(nn.Module):
    """A tensor that is neither a parameter nor a buffer, and a draw from the random numbers where asked for."""

    def __init__(self, factor: float, draws: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.factor, self.draws = TwoLayers(), torch.tensor(factor), draws

    def forward(self, image: Tensor) -> Tensor:
        noise = torch.rand(4) if self.draws else torch.zeros(4)
        result: Tensor = self.layers(F.dropout(image * self.factor + noise, 0.5, self.training))
        return result


def test_a_tensor_that_the_module_does_not_register_counts(tmp_path: Path) -> None:
    def run(factor: float) -> CachedCalibration:
        captured = mfcompile.capture(Scaled(factor).eval(), torch.ones(2, 3, 4))
        return calibrate_cached(captured, mfcompile.infer_regions(captured), [torch.ones(2, 3, 4)], cache_dir=tmp_path)

    assert [run(factor).is_reused for factor in (1.0, 2.0, 1.0)] == [False, False, True]


def test_the_seed_counts_where_the_model_draws_and_only_there(tmp_path: Path) -> None:
    def run(draws: bool, seed: int) -> bool:
        captured = mfcompile.capture(Scaled(1.0, draws).eval(), torch.ones(2, 3, 4))
        torch.manual_seed(seed)
        given = [torch.ones(2, 3, 4)]
        return calibrate_cached(captured, mfcompile.infer_regions(captured), given, cache_dir=tmp_path).is_reused

    assert [run(True, seed) for seed in (1, 2, 1)] == [False, False, True]
    assert [run(False, seed) for seed in (1, 2)] == [False, True]


def shuffled(generator: torch.Generator | None = None) -> DataLoader[Any]:
    return loader(6, sampler=RandomSampler(range(6), generator=generator))


class Noisy:
    """An augmentation that draws from a global generator."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[Batch]:
        for batch in batches():
            yield {**batch, "pixel_values": batch["pixel_values"] + self.draw()}


SEEDED: dict[str, Callable[[int], Any]] = {
    "loader": lambda _: shuffled(),
    "loader with a generator": lambda seed: shuffled(torch.Generator().manual_seed(seed)),
    "torch": lambda _: Noisy(lambda: float(torch.rand(()))),
    "numpy": lambda _: Noisy(np.random.rand),
    "python": lambda _: Noisy(random.random),
}


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("name", SEEDED)
def test_seeded_draws_find_their_entry_and_a_look_up_changes_no_draw(
    name: str, is_function: bool, run: Callable[..., CachedCalibration]
) -> None:
    def seeded(seed: int) -> bool:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        made = SEEDED[name](seed)
        return run((lambda: SEEDED[name](seed)) if is_function else made).is_reused

    # The entry of seed 1 is written without a look-up before, that of seed 2 after one that found nothing.
    assert [seeded(seed) for seed in (1, 1, 2, 2, 1)] == [False, True, False, True, True]


def test_draws_that_are_not_seeded_find_nothing(run: Callable[..., CachedCalibration]) -> None:
    draw = random.Random(0).random
    assert not run(Noisy(draw)).is_reused
    assert not run(Noisy(draw)).is_reused


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_entry_is_said_and_written_anew(content: bytes, run: Callable[..., CachedCalibration]) -> None:
    first = run(batches())
    assert first.entry is not None
    first.entry.write_bytes(content)
    second = run(batches())
    assert not second.is_reused
    (said,) = second.diagnostics
    assert said.subject == "calibration cache"
    assert said.reason.startswith("an entry was not used, and is written anew: ")
    assert str(first.entry) in said.reason
    assert_equal(first.statistics, second.statistics)
    assert run(batches()).is_reused


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, run: Callable[..., CachedCalibration]) -> None:
    (tmp_path / "statistics").write_text("a file where the directory should be")
    found = run(batches())
    assert found.entry is None
    assert found.statistics.batch_count == 2
    (said,) = found.diagnostics
    assert said.reason.startswith("the statistics were not kept: cannot write to")


def test_nothing_is_hashed_beforehand_without_an_entry_of_the_model(
    run: Callable[..., CachedCalibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    class Counted:
        def __iter__(self) -> Iterator[Batch]:
            read.append(1)
            return iter(batches())

    counted = Counted()
    run(counted)
    assert len(read) == 1
    monkeypatch.setattr(statistics_cache.StatisticsCache, "has_model", lambda *_: False)
    run(counted)
    assert len(read) == 2


def test_progress_knows_the_total(run: Callable[..., CachedCalibration]) -> None:
    seen: list[tuple[int, int | None]] = []
    run(batches(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    run(iter(batches(1)), progress=lambda done, total: seen.append((done, total)))
    assert seen[2:] == [(1, None)]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (vlm_batch(), {}, "give an iterable of batches"),
        (lambda: vlm_batch(), {}, "give an iterable of batches"),
        (3, {}, "give an iterable of batches"),
        ([], {"observe": "eyes"}, "choose auto, graph or module"),
        ([], {"num_samples": 0}, "must be a positive integer"),
        ([], {"padding_mask": "pixel_values"}, "is no .* input"),
    ],
)
def test_wrong_arguments_are_refused(
    given: Any, options: dict[str, Any], message: str, run: Callable[..., CachedCalibration]
) -> None:
    with pytest.raises(InputError, match=message):
        run(given, **options)


def test_what_calibration_refuses_is_not_kept(tmp_path: Path, run: Callable[..., CachedCalibration]) -> None:
    nan = {**vlm_batch(), "pixel_values": torch.full((2, 3, 8, 8), float("nan"))}
    for given, message in (([nan], "holds NaN"), ([], "calibration set is empty"), ([{"ids": torch.ones(1)}], "batch 0")):
        for _ in range(2):
            with pytest.raises(CalibrationError, match=message):
                run(given)
    assert not (tmp_path / "statistics").exists()
    run(batches())
    with pytest.raises(CalibrationError, match="calibration set is empty"):
        run([])


def test_a_region_without_a_token_is_refused_when_it_is_found_too(run: Callable[..., CachedCalibration]) -> None:
    """Regions do not change statistics, so that an entry may be found that another division would refuse."""
    sites = [site.name for site in vlm_regions().pruned_sites]
    found = run(batches())
    assert found.entry is not None
    blank = {name: replace(site, token_count=0) if name == sites[0] else site for name, site in found.statistics.sites.items()}
    replace(found.statistics, sites=blank).save(found.entry)
    assert run(batches()).is_reused
    alone = mfcompile.infer_regions(vlm_captured(), regions={sites[0]: "audio"})
    with pytest.raises(CalibrationError, match="region 'audio' received no calibration token"):
        run(batches(), regions=alone)
