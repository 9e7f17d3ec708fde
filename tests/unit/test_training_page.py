"""docs/training.md holds: its snippets run, one after the other."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mfcompile
from tests.models import tiny_vlm, vlm_batch

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Trainer:
        """Stands for the one of transformers, which tests/unit/training/test_trainer.py runs."""

        def __init__(self, model: nn.Module, args: Any, train_dataset: Any, callbacks: list[Any]) -> None:
            self.model, self.callbacks = model, callbacks

        def train(self) -> None:
            for callback in self.callbacks:
                calls.append(type(callback).__name__)
                callback.on_train_begin(None, None, None, model=self.model)
                callback.on_train_end(None, None, None, model=self.model)

    captioner = tiny_vlm(seed=4)
    captioner.decoder = captioner._modules.pop("text")  # type: ignore[assignment]
    names: dict[str, Any] = {
        "mfcompile": mfcompile,
        "torch": torch,
        "copy": copy,
        "model": tiny_vlm(),
        "plain": tiny_vlm(seed=3),
        "captioner": captioner,
        "example_inputs": vlm_batch(),
        "batches": [vlm_batch(seed=1), vlm_batch(seed=2)],
        "loss_of": lambda module, batch: module(**batch)["match"].square().mean(),
        "directory": tmp_path,
        "Trainer": Trainer,
        "arguments": None,
        "dataset": None,
    }
    for snippet in SNIPPETS:
        exec(compile(snippet, "docs/training.md", "exec"), names)
    assert calls == ["MaskCallback"]
    assert len(SNIPPETS) == 6
    printed = capsys.readouterr().out
    compiled = names["compiled"]
    pruned = compiled.masks.weight_count - compiled.masks.kept_count
    assert f"{pruned:,} of {pruned:,} pruned places hold zero" in printed
    assert f"{len(compiled.masks)} weights got masks, 0 masks went nowhere" in printed
    assert names["adapted"]
    assert all(name.startswith("text") for name in names["adapted"])
    for module in (names["again"], names["stripped"], names["plain"]):
        assert mfcompile.verify_masks(module, compiled.masks).pruned_count == pruned
    assert mfcompile.verify_masks(names["masked_captioner"]).pruned_count == pruned
