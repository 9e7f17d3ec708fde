"""Outputs as short as they are, with the positions of what they list; what cannot be done as asked is told."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.graph import CapturedGraph
from tests.token_models import Encoder, fixed, patches, seeded
from tests.token_reference import pick
from tests.unit.passes.test_token_pruning import reference

CLOSE: Any = {"rtol": 1e-4, "atol": 1e-5}
SITES = {"blocks.0.attention": 7, "blocks.1.attention": 5}


class Named(nn.Module):
    """States of all tokens, classes of all of them, what is behind CLS, and CLS."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(pool="all")
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        states = self.encoder(image)
        return {"states": states, "classes": self.head(states), "patches": states[:, 1:], "pooled": states[:, 0]}


@cache
def named() -> tuple[Any, CapturedGraph]:
    """A model that no test changes, exported once."""
    model = seeded(Named)
    return model, fixed(model, {"image": patches()})


def keep(sites: dict[str, int] = SITES) -> dict[str, int]:
    return {f"encoder.{name}": count for name, count in sites.items()}


def test_shorter_outputs_list_the_kept_tokens_and_where_they_were() -> None:
    model, captured = named()
    image = patches()
    fewer = mfcompile.prune_tokens(captured, keep(), outputs="shorter")
    with torch.no_grad():
        found = fewer.module(image=image)
        states, (first, second) = reference(model.encoder, image, {0: 7, 1: 5})
        states = model.encoder.norm(states)
    places = pick(first[..., None], second)[..., 0]
    assert list(found) == ["states", "classes", "patches", "pooled", "states_kept", "classes_kept", "patches_kept"]
    assert torch.equal(found["states_kept"], places)
    assert torch.equal(found["classes_kept"], places)
    assert torch.equal(found["patches_kept"], places[:, 1:] - 1)
    torch.testing.assert_close(found["states"], states, **CLOSE)
    torch.testing.assert_close(found["classes"], model.head(states), **CLOSE)
    torch.testing.assert_close(found["patches"], states[:, 1:], **CLOSE)
    torch.testing.assert_close(found["pooled"], states[:, 0], **CLOSE)


def test_one_cut_after_the_other_tells_positions_among_all() -> None:
    _, captured = named()
    image = patches(seed=4)
    at_once = mfcompile.prune_tokens(captured, keep(), outputs="shorter")
    first = mfcompile.prune_tokens(captured, keep({"blocks.0.attention": 7}), outputs="shorter")
    both = mfcompile.prune_tokens(first, keep({"blocks.1.attention": 5}), outputs="shorter")
    with torch.no_grad():
        wanted, found = at_once.module(image=image), both.module(image=image)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_keeping_all_lists_all() -> None:
    model, captured = named()
    image = patches()
    whole = mfcompile.prune_tokens(captured, keep({"blocks.0.attention": 10}), outputs="shorter")
    with torch.no_grad():
        wanted, found = model(image), whole.module(image=image)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(found["states_kept"], torch.arange(10).expand(3, -1))


def test_a_merged_token_has_no_position() -> None:
    _, captured = named()
    fewer = mfcompile.prune_tokens(captured, keep({"blocks.0.attention": 6}), outputs="shorter", rest="merge")
    with torch.no_grad():
        found = fewer.module(image=patches())
    assert found["states"].shape[1] == found["states_kept"].shape[1] == 7
    assert (found["states_kept"][:, -1] == -1).all()
    assert (found["patches_kept"][:, -1] == -1).all()
    assert (found["states_kept"][:, :-1].diff(dim=1) > 0).all()


def test_files_name_the_outputs_of_positions(tmp_path: Path) -> None:
    _, captured = named()
    fewer = mfcompile.prune_tokens(captured, keep(), outputs="shorter")
    artifact = mfcompile.export_onnx(fewer, tmp_path / "shorter.onnx")
    assert mfcompile.verify(artifact, fewer).passed
    model = onnx.load(artifact.path)
    assert [item.name for item in model.graph.output][-3:] == ["states_kept", "classes_kept", "patches_kept"]
    told = {item.key: item.value for item in model.metadata_props}
    assert json.loads(told["mfcompile.kept"]) == {
        "states_kept": "states", "classes_kept": "classes", "patches_kept": "patches",
    }  # fmt: skip
    assert [cut["kept"] for cut in json.loads(told["mfcompile.tokens"])[0]["cuts"]] == [7, 5]


def test_outputs_are_restored_or_shorter() -> None:
    _, captured = named()
    with pytest.raises(mfcompile.InputError, match="outputs='long' is not known; choose one of restore, shorter"):
        mfcompile.prune_tokens(captured, keep(), outputs="long")


def test_what_has_no_last_state_is_told() -> None:
    _, captured = named()
    fewer = mfcompile.prune_tokens(captured, keep({"blocks.0.attention": 6}), restore="last")
    told = [str(item) for item in fewer.diagnostics]
    assert len([line for line in told if "restore='last' is not possible" in line and "an output reads" in line]) == 1
    assert any("[s" in line or "3]" in line for line in told)
    assert f"note: {told[0]}" in str(fewer)
    assert mfcompile.prune_tokens(captured, keep({"blocks.0.attention": 6})).diagnostics == ()


def test_means_over_fewer_tokens_are_told() -> None:
    captured = fixed(seeded(lambda: Encoder(pool="mean")), {"image": patches()})
    fewer = mfcompile.prune_tokens(captured, {"blocks.0.attention": 6})
    assert any("reduces over the tokens that are kept" in item.reason for item in fewer.diagnostics)
    regions = mfcompile.infer_regions(fewer)
    from mfcompile.report import describe_plan

    report = describe_plan(fewer, regions)
    assert any("reduces over the tokens" in item["reason"] for item in report["diagnostics"])
    assert report["tokens"][0]["cuts"][0]["kept"] == 6
