import gc
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import nn

from mfcompile.errors import InputError
from mfcompile.frontends.sources import ModelSource, load_source

_MODEL = """
    import torch
    from torch import nn
    model = nn.Linear(3, 2)
    example_inputs = torch.ones(2, 3)
"""


def _write(folder: Path, text: str, name: str = "model.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(dedent(text))
    return path


def test_importing_sources_does_not_import_transformers() -> None:
    code = "import sys, mfcompile.frontends.sources; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _load(folder: Path, text: str) -> ModelSource:
    return load_source(_write(folder, text))


def _load_with(folder: Path, text: str) -> ModelSource:
    return _load(folder, dedent(_MODEL) + dedent(text))


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_source(path)
    return str(caught.value)


def _draw(source: ModelSource) -> list[Any]:
    assert source.calibration is not None
    return list(source.calibration())


# What a model.py gives


def test_a_list_of_batches_keeps_its_length(tmp_path: Path) -> None:
    source = _load_with(tmp_path, "calibration_batches = [torch.ones(2, 3)] * 5")
    assert source.calibration is not None
    batches = source.calibration()
    assert len(batches) == len(list(batches)) == 5  # type: ignore[arg-type]


def test_smallest_file(tmp_path: Path) -> None:
    source = _load(tmp_path, _MODEL)
    assert isinstance(source.model, nn.Linear)
    assert source.kind == "python"
    assert source.path == tmp_path / "model.py"
    torch.testing.assert_close(source.example_inputs, torch.ones(2, 3), rtol=0, atol=0)
    assert (source.calibration, source.evaluate, source.padding_mask, source.save_extras) == (None, None, None, None)
    assert (dict(source.modalities), dict(source.regions)) == ({}, {})


def test_everything_a_file_may_define(tmp_path: Path) -> None:
    source = _load(
        tmp_path,
        """
        import torch
        from torch import nn
        def build_model():
            return nn.Linear(3, 2)
        def example_inputs():
            return {"input": torch.ones(1, 3)}
        def calibration_batches():
            for value in range(3):
                yield {"input": torch.full((1, 3), float(value))}
        def evaluate(model):
            return {"features": model.out_features}
        modalities = {"input": "vision"}
        regions = {"head": "fusion"}
        padding_mask = "attention_mask"
        """,
    )
    assert isinstance(source.model, nn.Linear)
    assert list(source.example_inputs) == ["input"]
    assert [batch["input"][0, 0].item() for batch in _draw(source)] == [0, 1, 2]
    assert [batch["input"][0, 0].item() for batch in _draw(source)] == [0, 1, 2]
    assert source.evaluate is not None
    assert source.evaluate(source.model) == {"features": 2}
    assert dict(source.modalities) == {"input": "vision"}
    assert dict(source.regions) == {"head": "fusion"}
    assert source.padding_mask == "attention_mask"


def test_a_model_in_train_mode_is_set_to_eval_and_that_is_said(tmp_path: Path) -> None:
    source = _load(tmp_path, _MODEL)
    assert not source.model.training
    assert source.notes == ("the model was in train mode and was set to eval(): dropout is off, batch norm is frozen",)
    assert _load_with(tmp_path, "model.eval()").notes == ()


def test_model_wins_over_build_model_and_that_is_said(tmp_path: Path) -> None:
    source = _load_with(tmp_path, "def build_model(): raise RuntimeError")
    assert "model.py defines both model and build_model(): model was used" in source.notes


# Calibration batches


def test_a_list_a_loader_and_a_map_style_dataset_are_read_anew_each_time(tmp_path: Path) -> None:
    loader = "torch.utils.data.DataLoader(torch.arange(4.), batch_size=2)"
    dataset = "type('Data', (), {'__len__': lambda self: 2, '__getitem__': lambda self, i: torch.full((2,), i)})()"
    for value, expected in (("[torch.ones(2)] * 3", 3), (loader, 2), (dataset, 2)):
        source = _load_with(tmp_path, f"calibration_batches = {value}")
        assert [len(batch) for batch in _draw(source)] == [2] * expected, value
        assert len(_draw(source)) == expected, value


def test_a_generator_object_is_replayed_and_that_is_said(tmp_path: Path) -> None:
    source = _load_with(
        tmp_path,
        """
        drawn = []
        def batches():
            for value in range(3):
                drawn.append(value)
                yield torch.tensor(value)
        calibration_batches = batches()
        def evaluate(model):
            return list(drawn)
        """,
    )
    assert source.calibration is not None
    assert source.evaluate is not None
    first = iter(source.calibration())
    assert next(first).item() == 0
    assert source.evaluate(source.model) == [0], "batches are drawn when they are needed"
    assert [batch.item() for batch in _draw(source)] == [0, 1, 2]
    assert [batch.item() for batch in first] == [1, 2]
    assert source.evaluate(source.model) == [0, 1, 2], "and only once"
    assert any("calibration_batches is an iterator (generator), which can be read only once" in n for n in source.notes)


def test_a_generator_that_raised_raises_again_instead_of_ending_early(tmp_path: Path) -> None:
    source = _load_with(
        tmp_path,
        """
        def batches():
            yield torch.ones(1)
            raise KeyError("caption")
        calibration_batches = batches()
        """,
    )
    for _ in range(2):
        with pytest.raises(InputError, match=r"drawing from calibration_batches failed at .*model.py:9: KeyError"):
            _draw(source)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("torch.ones(2, 3)", "is a Tensor, not an iterable of batches. If it is one batch, write [calibration_batches]"),
        ("{'input': torch.ones(2, 3)}", "is a dict, not an iterable of batches. If it is one batch, write"),
        ("3", "is an int, not an iterable of batches. Give a list or DataLoader of batches"),
        ("'batches'", "is a str, not an iterable of batches. Give a list or DataLoader of batches"),
    ],
)
def test_what_is_no_iterable_of_batches(tmp_path: Path, value: str, problem: str) -> None:
    path = _write(tmp_path, dedent(_MODEL) + f"calibration_batches = {value}\n")
    assert f"calibration_batches in {path} {problem}" in _refusal(path)
    source = _load_with(tmp_path, f"def calibration_batches(): return {value}")
    with pytest.raises(InputError, match=re.escape(f"calibration_batches() in {path} {problem.partition('. ')[0]}")):
        _draw(source)


# Siblings and isolation


def _write_twins(tmp_path: Path) -> tuple[Path, Path]:
    text = """
        import torch
        from torch import nn
        from tokenizer import NAME
        from parts.head import SIZE
        model = nn.Linear(3, SIZE)
        example_inputs = torch.ones(1, 3)
        def evaluate(model):
            import tokenizer, late
            return NAME, tokenizer.NAME, late.NAME
        def calibration_batches():
            import tokenizer
            yield tokenizer.NAME
            import late
            yield late.NAME
    """
    for name, size in (("a", 2), ("b", 4)):
        folder = tmp_path / name
        _write(folder, text)
        _write(folder, f"NAME = '{name}'", "tokenizer.py")
        _write(folder, f"NAME = 'late {name}'", "late.py")
        _write(folder / "parts", f"SIZE = {size}", "head.py")
    return tmp_path / "a" / "model.py", tmp_path / "b" / "model.py"


def test_two_files_get_their_own_siblings(tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    a, b = (load_source(file) for file in _write_twins(tmp_path))
    assert [source.model.get_parameter("bias").shape[0] for source in (a, b)] == [2, 4]
    assert a.evaluate is not None
    assert b.evaluate is not None
    assert a.calibration is not None
    batches = iter(a.calibration())
    assert next(batches) == "a"
    assert b.evaluate(b.model) == ("b", "b", "late b")
    assert a.evaluate(a.model) == ("a", "a", "late a")
    assert _draw(b) == ["b", "late b"]
    assert list(batches) == ["late a"]
    assert sys.path == path
    assert {name for name in set(sys.modules) - modules if not name.startswith("_mfcompile_source_")} == set()


def test_a_sibling_is_executed_once(tmp_path: Path) -> None:
    _write(tmp_path, "calls = []", "state.py")
    source = _load_with(
        tmp_path,
        """
        import state
        def evaluate(model):
            import state as again
            again.calls.append(1)
            return len(state.calls)
        """,
    )
    assert source.evaluate is not None
    assert [source.evaluate(source.model) for _ in range(2)] == [1, 2]


def test_a_sibling_wins_over_a_loaded_module_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "installed", "NAME = 'installed'", "tokenizer.py")
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    import tokenizer  # type: ignore[import-not-found]

    a, _ = (load_source(file) for file in _write_twins(tmp_path))
    assert a.evaluate is not None
    assert a.evaluate(a.model)[0] == "a"
    assert sys.modules["tokenizer"] is tokenizer, "and the loaded one is back afterwards"
    monkeypatch.delitem(sys.modules, "tokenizer")


def test_the_standard_library_and_extension_packages_are_not_replaced(tmp_path: Path) -> None:
    import json

    for name in ("json", "torch", "numpy", "mfcompile"):
        _write(tmp_path, "raise RuntimeError('shadowed')", f"{name}.py")
    _load(tmp_path, dedent(_MODEL) + "import json, numpy, mfcompile\n")
    assert sys.modules["torch"] is torch
    assert sys.modules["json"] is json


def test_the_environment_is_cleaned_up_when_the_file_raises(tmp_path: Path) -> None:
    path, modules = list(sys.path), set(sys.modules)
    _write(tmp_path, "X = 1", "some_sibling.py")
    _refusal(_write(tmp_path, "import some_sibling\nraise ValueError('no')"))
    assert sys.path == path
    assert set(sys.modules) == modules


def test_dataclasses_with_postponed_annotations_resolve(tmp_path: Path) -> None:
    text = """
        from __future__ import annotations
        from dataclasses import dataclass
        import typing, torch
        from torch import nn
        @dataclass
        class Size:
            width: int
        model = nn.Linear(3, typing.get_type_hints(Size)["width"](2))
        example_inputs = torch.ones(1, 3)
        def evaluate(model):
            return typing.get_type_hints(Size)
    """
    source = _load(tmp_path, text)
    gc.collect()
    assert source.evaluate is not None
    assert source.evaluate(source.model) == {"width": int}


def test_the_main_guard_is_not_entered(tmp_path: Path) -> None:
    _load_with(tmp_path, "if __name__ == '__main__':\n    raise RuntimeError\n")
