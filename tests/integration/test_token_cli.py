"""Fewer tokens from the command line: with masks, recorded, reproduced, verified, and listed before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import yaml

from mfcompile.cli import main

Command = Callable[..., tuple[int, str, str]]

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        q, k, v = (layer(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.patch = nn.Linear(12, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, pixel_values):
        x = self.patch(pixel_values.flatten(2).transpose(1, 2).reshape(-1, 8, 12))
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return {"states": x, "pooled": x[:, 0]}


torch.manual_seed(0)
model = Net().eval()
example_inputs = {"pixel_values": torch.randn(2, 3, 4, 8)}
calibration_batches = [{"pixel_values": torch.randn(4, 3, 4, 8)} for _ in range(2)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model.py."""
    place = tmp_path_factory.mktemp("tokens")
    (place / "model.py").write_text(MODEL)
    return place


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Calls ``mfcompile`` in the folder."""
    monkeypatch.chdir(folder)

    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_tokens_and_masks_together_are_recorded_reproduced_and_verified(command: Command, folder: Path) -> None:
    options = ("--tokens", "region:vision=0.5", "--token-scorer", "cls_attention", "--token-outputs", "shorter")
    status, out, err = command("prune", "model.py", *options, "--sparsity", 0.5, "-o", "done")
    assert status == 0, err
    assert "by having fewer tokens" in out
    recipe = yaml.safe_load((folder / "done" / "recipe.yaml").read_text())
    assert recipe["tokens"] == {"region:vision": 0.5}
    assert recipe["token_scorer"] == "cls_attention"
    report = json.loads((folder / "done" / "report.json").read_text())
    assert [(cut["arriving"], cut["kept"]) for cut in report["tokens"][0]["cuts"]] == [(9, 5), (5, 3), (3, 2)]
    # norms are those of fewer tokens: 2 batches of 4 images
    seen = {site["name"]: site["tokens"] for site in report["sites"]}
    assert seen["blocks.0.q.weight"] == 8 * 9
    assert seen["blocks.2.down.weight"] == 8 * 2
    names = [item.name for item in onnx.load(folder / "done" / "model.onnx").graph.output]
    assert names == ["states", "pooled", "states_kept"]
    masks = ("--masks", "done/masks.safetensors")
    status, out, err = command("verify", "done/model.onnx", "model.py", *masks)
    assert status == 0, err
    assert "agrees with model.py" in out
    status, out, err = command("prune", "done/recipe.yaml", "-o", "again")
    assert status == 0, err
    assert "The recipe was reproduced" in out
    status, out, err = command("prune", "done/recipe.yaml", "--tokens", 0.9, "-o", "other", "--no-onnx")
    assert status == 0, err
    assert "another tokens" in err + out


def test_inspect_lists_sites_and_units(command: Command, folder: Path) -> None:
    status, out, err = command("inspect", "model.py", "--tokens", "--units")
    assert status == 0, err
    assert "Token sites: 3" in out
    assert "Structural units: " in out
    status, out, err = command("inspect", "model.py", "--tokens", "--json", "-")
    sites = json.loads(out)["token_sites"]["sites"]
    assert [(site["name"], site["tokens"], site["protected"]) for site in sites] == [
        (f"blocks.{number}", 9, 1) for number in range(3)
    ]


def test_a_dry_run_shows_the_cuts(command: Command) -> None:
    status, out, err = command("prune", "model.py", "--tokens", "blocks.1=4", "--dry-run")
    assert status == 0, err
    assert "44.44 %" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens", "a=b"), "is no share"),
        (("--tokens", "0.5", "blocks.1=4"), "give one share"),
        (("--tokens", "blocks.1=4", "blocks.1=5"), "given twice"),
        (("--tokens", "0.5", "--token-scorer", "best"), "scorer='best' is not known"),
        (("--tokens", "0.5", "--split", "regions"), "leave out --split"),
        (("--tokens", "nothing=0.5"), "there is no attention of that name"),
        (("--tokens", "-0.5"), "no share"),
    ],
)
def test_what_cannot_be_met_is_refused(words: tuple[str, ...], message: str, command: Command) -> None:
    status, _, err = command("prune", "model.py", *words, "-o", "never")
    assert status == 2
    assert message in err
