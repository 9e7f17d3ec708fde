"""The cache of statistics: where it lies, what it keeps, what tells batches apart, and what happens when processes meet."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mfcompile import statistics_cache
from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs, normalize_inputs
from mfcompile.statistics import CalibrationStatistics, SiteStatistics
from mfcompile.statistics_cache import BatchHasher, StatisticsCache, default_cache_dir, tensor_bytes


def statistics(value: float = 1.0, width: int = 2) -> CalibrationStatistics:
    sums = torch.full((width,), value, dtype=torch.float64)
    return CalibrationStatistics({"a": SiteStatistics(sums, 1, 0, 1)}, 1, "calibration batches", "graph")


def value_of(found: CalibrationStatistics | None) -> float | None:
    return None if found is None else float(found.sites["a"].sum_of_squares[0])


def test_an_entry_lies_under_both_keys_and_is_found_again(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path)
    assert not cache.has_model("m")
    assert cache.find("m", "d") is None
    path = cache.store("m", "d", statistics(3.0))
    assert path == tmp_path / "statistics" / "m" / "d.safetensors"
    assert cache.has_model("m")
    assert not cache.has_model("n")
    assert value_of(cache.find("m", "d")) == 3.0
    assert cache.find("m", "e") is None
    assert cache.find("n", "d") is None


def test_the_directory_is_given_or_named_by_the_environment_or_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFCOMPILE_CACHE", str(tmp_path / "named"))
    assert StatisticsCache(tmp_path / "given").directory == tmp_path / "given" / "statistics"
    assert StatisticsCache().directory == tmp_path / "named" / "statistics"
    monkeypatch.setenv("MFCOMPILE_CACHE", "~/caches")
    assert default_cache_dir() == Path.home() / "caches"
    monkeypatch.setenv("MFCOMPILE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert default_cache_dir() == tmp_path / "mfcompile"


def test_entries_that_were_not_used_for_longest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics_cache, "ENTRIES_PER_MODEL", 3)
    cache = StatisticsCache(tmp_path)
    for age, name in enumerate(("a", "b", "c")):
        os.utime(cache.store("m", name, statistics()), (1000 + age, 1000 + age))
    other = cache.store("n", "a", statistics())
    os.utime(other, (1, 1))
    assert cache.find("m", "a") is not None  # now the youngest
    cache.store("m", "d", statistics())
    assert sorted(path.stem for path in (tmp_path / "statistics" / "m").iterdir()) == ["a", "c", "d"]
    assert other.exists()


def test_all_entries_together_take_a_bounded_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StatisticsCache(tmp_path)
    size = cache.store("0", "d", statistics()).stat().st_size
    monkeypatch.setattr(statistics_cache, "TOTAL_BYTES", 3 * size + size // 2)
    for age in range(6):
        os.utime(cache.store(str(age), "d", statistics()), (1000 + age, 1000 + age))
    assert sorted(path.name for path in (tmp_path / "statistics").iterdir()) == ["3", "4", "5"]
    large = cache.store("9", "d", statistics(width=10_000))  # more than all of it: the newest stays, alone
    assert list((tmp_path / "statistics").glob("*/*")) == [large]


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path)
    folder = cache.store("m", "d", statistics()).parent
    for name, mtime in ((".d.safetensors.old", 1.0), (".d.safetensors.new", None)):
        (folder / name).write_bytes(b"half")
        if mtime is not None:
            os.utime(folder / name, (mtime, mtime))
    assert cache.has_model("m")
    cache.store("m", "e", statistics())
    assert sorted(path.name for path in folder.iterdir()) == [".d.safetensors.new", "d.safetensors", "e.safetensors"]


def test_a_half_written_file_is_no_entry(tmp_path: Path) -> None:
    folder = tmp_path / "statistics" / "m"
    folder.mkdir(parents=True)
    (folder / ".d.safetensors.x").write_bytes(b"half")
    assert not StatisticsCache(tmp_path).has_model("m")


def test_a_folder_that_may_not_be_read_has_no_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StatisticsCache(tmp_path)
    cache.store("m", "d", statistics())
    assert cache.has_model("m")

    def refuse(_: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert not cache.has_model("m")


def test_a_damaged_entry_is_said_and_written_over(tmp_path: Path) -> None:
    cache = StatisticsCache(tmp_path)
    cache.store("m", "d", statistics()).write_bytes(b"x")
    with pytest.raises(InputError, match="damaged"):
        cache.find("m", "d")
    cache.store("m", "d", statistics(2.0))
    assert value_of(cache.find("m", "d")) == 2.0


WRITER = """
import sys, torch
from pathlib import Path
from mfcompile import statistics_cache
from mfcompile.statistics import CalibrationStatistics, SiteStatistics
statistics_cache.ENTRIES_PER_MODEL = 2
statistics_cache.TOTAL_BYTES = 90_000  # two entries of three models: folders come and go as well
cache = statistics_cache.StatisticsCache(sys.argv[1])
for turn in range(60):
    model, key = f"m{turn // 2 % 3}", f"d{turn % 4}"
    sums = torch.full((5000,), float(turn % 4), dtype=torch.float64)
    cache.store(model, key, CalibrationStatistics({"a": SiteStatistics(sums, 1, 0, 1)}, 1, "", ""))
    for name in ("m0", "m1", "m2"):
        cache.has_model(name)
        found = cache.find(name, key)
        assert found is None or float(found.sites["a"].sum_of_squares[0]) == turn % 4
"""


def test_processes_that_write_and_remove_the_same_entries_do_not_harm_each_other(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for writer in writers:
        assert (writer.communicate()[1], writer.returncode) == ("", 0)
    left = list((tmp_path / "statistics").glob("*/*"))
    assert 1 <= len(left) <= 4
    assert all(CalibrationStatistics.load(path) for path in left)


class Model(nn.Module):
    def forward(self, image: Any, ids: Any = None, scale: Any = None) -> Any:
        return image


def inputs(*args: Any, **kwargs: Any) -> ExampleInputs:
    return normalize_inputs(Model(), kwargs or args)


def key(*batches: ExampleInputs, head: str = "") -> str:
    hasher = BatchHasher(head)
    for batch in batches:
        hasher.add(batch)
    return hasher.hexdigest()


IMAGE = torch.arange(12.0).reshape(3, 4)

OTHER: dict[str, Callable[[], ExampleInputs]] = {
    "value": lambda: inputs(image=IMAGE + torch.eye(3, 4) * 1e-6),
    "sign of zero": lambda: inputs(image=torch.cat([-IMAGE[:1, :1], IMAGE.reshape(1, 12)[:, 1:]], 1).reshape(3, 4)),
    "shape": lambda: inputs(image=IMAGE.reshape(4, 3)),
    "dtype": lambda: inputs(image=IMAGE.double()),
    "bits of another dtype": lambda: inputs(image=IMAGE.view(torch.int32)),
    "order": lambda: inputs(image=IMAGE.flip(0)),
    "name": lambda: inputs(image=IMAGE[:0], ids=IMAGE),
    "one more": lambda: inputs(image=IMAGE, ids=IMAGE),
    "a number": lambda: inputs(image=IMAGE, scale=2),
    "another number": lambda: inputs(image=IMAGE, scale=2.0),
    "a text": lambda: inputs(image=IMAGE, scale="2"),
    "an array": lambda: inputs(image=IMAGE, scale=np.zeros(5000)),
    "another array": lambda: inputs(image=IMAGE, scale=np.eye(5000, 1)),
    "positional": lambda: inputs(IMAGE),
}


def test_whatever_differs_gives_another_key() -> None:
    keys = {key(inputs(image=IMAGE)), *(key(make()) for make in OTHER.values())}
    assert len(keys) == len(OTHER) + 1


def test_how_batches_are_cut_and_where_they_come_from_is_part_of_the_key() -> None:
    one, two = inputs(image=IMAGE), inputs(image=IMAGE * 2)
    keys = [key(one, two), key(two, one), key(one), key(inputs(image=torch.cat([IMAGE, IMAGE * 2]))), key(one, head="random")]
    assert len(set(keys)) == len(keys)


def test_the_same_values_have_the_same_key_however_they_lie_in_memory() -> None:
    expected = key(inputs(image=IMAGE))
    wide = torch.zeros(6, 8)
    wide[::2, ::2] = IMAGE
    for same in (IMAGE.clone(), IMAGE.t().contiguous().t(), wide[::2, ::2], IMAGE.clone().requires_grad_()):
        assert key(inputs(image=same)) == expected
    assert key(inputs(**OrderedDict(image=IMAGE))) == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.int8, torch.complex64])
def test_bytes_of_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 2]]).to(dtype)
    assert bytes(tensor_bytes(tensor)) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(tensor[:, :0])) == b""
    assert bytes(tensor_bytes(tensor[0, 2])) == bytes(tensor_bytes(tensor))[-tensor.element_size() :]


def test_an_argument_that_cannot_be_written_down_is_like_no_other() -> None:
    """A key that does not speak of it could find statistics of something else."""
    batch = inputs(image=IMAGE, scale=lambda: 1)
    assert key(batch) != key(batch)
