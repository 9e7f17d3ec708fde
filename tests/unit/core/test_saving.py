"""Saved weights are reloaded by torch and safetensors alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mfcompile.saving import save_weights


def check(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The file gives back the whole state dict."""
    save_weights(model, path)
    stored = load_file(path / "model.safetensors")
    with safe_open(path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("format") == "pt"
    whole = {**stored, **{name: stored[first] for name, first in metadata.items()}}
    assert set(whole) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole[name], tensor)
        assert whole[name].dtype == tensor.dtype
    return stored


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("hidden", torch.ones(2), persistent=False)


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    assert set(check(Tied(), tmp_path)) == {"table.weight", "head.bias", "steps"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    check(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype), tmp_path)


class Views(nn.Module):
    """Parameters in one storage: overlapping, transposed, and two halves."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.arange(24.0)
        self.first = nn.Parameter(flat[:12].view(3, 4))
        self.second = nn.Parameter(flat[12:].view(3, 4))
        self.turned = nn.Parameter(flat[:12].view(3, 4).t())
        self.whole = nn.Parameter(flat)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.also_empty = nn.Parameter(torch.empty(0, 3))


def test_parameters_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    assert len(check(Views(), tmp_path)) == 6


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 2}

    def set_extra_state(self, state: object) -> None:
        pass


def test_extra_state_that_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    save_weights(Extra(2, 2), tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"weight", "bias"}


class Own(nn.Linear):
    def save_pretrained(self, directory: Path) -> None:
        (directory / "mine.txt").write_text("saved")


def test_a_model_that_can_save_itself_does(tmp_path: Path) -> None:
    save_weights(Own(2, 2), tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]
