"""Files of statistics: back to the bit, refused when anything about them is wrong, and short for thousands of sites."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mfcompile.errors import InputError
from mfcompile.graph import Diagnostic
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.statistics import CalibrationStatistics, SiteStatistics
from mfcompile.statistics_file import save_statistics
from tests.models import vlm_regions, vlm_statistics

COUNTS = st.integers(0, 2**62)
NUMBERS = st.floats(width=64, allow_nan=True)  # infinities, subnormal numbers and both zeros among them
SITES = st.dictionaries(
    st.text(max_size=8),  # an ONNX file may call its tensors anything
    st.builds(
        lambda sums, counts: SiteStatistics(torch.tensor(sums, dtype=torch.float64), *counts),
        st.lists(NUMBERS, max_size=5),
        st.tuples(COUNTS, COUNTS, COUNTS),
    ),
    max_size=4,
)


def statistics() -> CalibrationStatistics:
    sites = {
        "text.0.up": SiteStatistics(torch.tensor([1 / 3, 2.0**-1074, 0.0], dtype=torch.float64), 40, 3, 8),
        "vision.0.up[4:8]": SiteStatistics(torch.tensor([1e300], dtype=torch.float64), 128, 0, 8),
        "text.0.down": SiteStatistics(torch.tensor([math.pi, 1 + 2.0**-52], dtype=torch.float64), 0, 0, 0),
    }
    diagnostics = (Diagnostic("text.0.down", "no token: é\n"), Diagnostic("mask", ""))
    return CalibrationStatistics(sites, 3, "calibration batches", "graph+module", ("one", "two"), diagnostics, "f" * 64)


def state(found: CalibrationStatistics) -> tuple[Any, ...]:
    sites = [
        (name, site.sum_of_squares.dtype, site.sum_of_squares.numpy().tobytes(), *list(vars(site).values())[1:])
        for name, site in found.sites.items()
    ]
    return sites, {name: value for name, value in vars(found).items() if name != "sites"}


def test_a_file_gives_back_what_was_saved_to_the_bit(tmp_path: Path) -> None:
    saved = statistics()
    path = saved.save(tmp_path / "deep" / "statistics.safetensors")
    assert state(CalibrationStatistics.load(str(path))) == state(saved)
    assert [item.name for item in path.parent.iterdir()] == ["statistics.safetensors"]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(SITES, st.text(max_size=5), st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=2))
def test_any_numbers_and_any_names_come_back(
    tmp_path_factory: pytest.TempPathFactory, sites: dict[str, SiteStatistics], text: str, said: list[tuple[str, str]]
) -> None:
    diagnostics = tuple(Diagnostic(*item) for item in said)
    saved = CalibrationStatistics(sites, 1, text, text, (text,), diagnostics)
    path = saved.save(tmp_path_factory.mktemp("any") / "statistics.safetensors")
    assert state(CalibrationStatistics.load(path)) == state(saved)


def test_real_statistics_come_back_and_are_usable(tmp_path: Path) -> None:
    found = CalibrationStatistics.load(vlm_statistics().save(tmp_path / "statistics.safetensors"))
    assert state(found) == state(vlm_statistics())
    found.check_fits(vlm_regions().pruned_sites)
    doubled = found.merge(vlm_statistics())  # memory of its own, not a view into the file
    assert doubled.batch_count == 2 * found.batch_count


def test_thousands_of_experts_take_two_tensors(tmp_path: Path) -> None:
    sums = torch.rand(64, dtype=torch.float64)
    saved = CalibrationStatistics({f"experts[{index}]": SiteStatistics(sums, 1, 2, 3) for index in range(5000)}, 1, "a", "b")
    path = saved.save(tmp_path / "statistics.safetensors")
    with safe_open(path, framework="numpy") as file:
        assert sorted(file.keys()) == ["counts", "sums"]
    assert path.stat().st_size < 5000 * (64 * 8 + 4 * 8 + 24)
    assert state(CalibrationStatistics.load(path)) == state(saved)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no statistics file at .*nowhere"):
        CalibrationStatistics.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(InputError, match="no statistics file at"):
        CalibrationStatistics.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"not safetensors at all", b"\xff" * 64])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as a statistics file .*: it is damaged or truncated"):
        CalibrationStatistics.load(tmp_path / "file")


def test_masks_and_plain_safetensors_are_no_statistics(tmp_path: Path) -> None:
    masks = MaskSet({"a": PackedMask.pack(torch.ones(2, 3, dtype=torch.bool))}).save(tmp_path / "masks.safetensors")
    save_file({"sums": np.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match=r"not of calibration statistics: its metadata names mfcompile\.masks"):
        CalibrationStatistics.load(masks)
    with pytest.raises(InputError, match="its metadata names no mfcompile format"):
        CalibrationStatistics.load(tmp_path / "plain.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = statistics().save(tmp_path / "whole").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged"):
            CalibrationStatistics.load(tmp_path / "cut")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Of the values and of what is said of them."""
    data = statistics().save(tmp_path / "whole").read_bytes()
    for place in range(0, len(data), 5):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        (tmp_path / "flipped").write_bytes(broken)
        try:
            found = CalibrationStatistics.load(tmp_path / "flipped")
        except InputError:
            continue
        assert state(found) == state(statistics())  # white space of the header


def rewrite(path: Path, changes: dict[str, str], arrays: dict[str, Any]) -> None:
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
    save_file({**load_file(path), **arrays}, path, metadata={**metadata, **changes})


WRONG: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "version": ({"format_version": "0"}, {}, r"is of statistics format 0; this version reads 1 and 2\. Calibrate again"),
    "digest": ({"sha256": "0" * 64}, {}, "the statistics do not match their sha256"),
    "source": ({"source": "other batches"}, {}, "do not match their sha256"),
    "sums": ({}, {"sums": np.zeros(6)}, "do not match their sha256"),
    "counts": ({}, {"counts": np.zeros((3, 4), np.int64)}, "do not match their sha256"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, name: str) -> None:
    changes, arrays, message = WRONG[name]
    path = statistics().save(tmp_path / "statistics.safetensors")
    rewrite(path, {}, {})
    assert state(CalibrationStatistics.load(path)) == state(statistics())
    rewrite(path, changes, arrays)
    with pytest.raises(InputError, match=message):
        CalibrationStatistics.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata, arrays: metadata.update(sites=json.dumps(["a"])),
        lambda metadata, arrays: metadata.pop("observed_by"),
        lambda metadata, arrays: metadata.update(batch_count="many"),
        lambda metadata, arrays: arrays.update(sums=np.zeros(7)),
        lambda metadata, arrays: arrays.update(sums=np.zeros(6, np.float32)),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, str], dict[str, Any]], Any]
) -> None:
    """Also where its digest is right."""
    path = statistics().save(tmp_path / "statistics.safetensors")
    with safe_open(path, framework="numpy") as file:
        metadata, arrays = dict(file.metadata()), load_file(path)
    change(metadata, arrays)
    save_file(arrays, path, metadata=metadata)
    monkeypatch.setattr("mfcompile.statistics_file._digest", lambda *_: metadata["sha256"])
    with pytest.raises(InputError, match="cannot be read as a statistics file"):
        CalibrationStatistics.load(path)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = statistics().save(tmp_path / "statistics.safetensors")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_statistics(replace(statistics(), batch_count=99), path)
    assert [item.name for item in tmp_path.iterdir()] == ["statistics.safetensors"]
    assert CalibrationStatistics.load(path).batch_count == 3


def test_statistics_of_other_sites_or_another_model_do_not_fit() -> None:
    sites, found = vlm_regions().pruned_sites, replace(vlm_statistics(), fingerprint="a" * 64)
    found.check_fits(sites)
    found.check_fits(sites, "a" * 64)
    replace(found, fingerprint="").check_fits(sites, "b" * 64)
    with pytest.raises(InputError, match=r"taken from a model with fingerprint a{16}\.\.\., this model's is b{16}\.\.\."):
        found.check_fits(sites, "b" * 64)
    with pytest.raises(InputError, match=r"hold none for vision\.0\.attention\.query\.weight, which has 8 input features"):
        replace(found, sites={}).check_fits(sites)
    with pytest.raises(InputError, match=r"those of 8 input features for vision\.0\.attention\.query\.weight, which has 9"):
        found.check_fits([replace(sites[0], in_features=9), *sites[1:]])
