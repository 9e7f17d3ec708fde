"""Models with fewer tokens as ONNX files: parity with the module, fixed lengths, no loops, masks on top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

import mfcompile
from mfcompile.tokens import TokenEvidence
from tests.token_models import Encoder, blip_like, clip_like, fixed, llava_like, patches, seeded

DYNAMIC = {"Loop", "If", "NonZero", "Scan", "Compress", "Unique"}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def free_dimensions(path: Path) -> set[str]:
    """Names of the dimensions of inputs and outputs that are not numbers."""
    graph = onnx.load(path).graph
    values = [*graph.input, *graph.output]
    return {
        dim.dim_param or "?" for value in values for dim in value.type.tensor_type.shape.dim if not dim.HasField("dim_value")
    }


def largest_difference(report: mfcompile.ParityReport) -> float:
    return max(output.max_abs_diff for output in report.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("family", [clip_like, blip_like, llava_like])
def test_a_file_with_cuts_in_every_tower_computes_what_the_module_does(family: Any, tmp_path: Path) -> None:
    model, batch = family()
    captured = fixed(model, batch)
    sites = [site for site in mfcompile.find_token_sites(captured).sites if "layers.0" in site.name or "layer.0" in site.name]
    assert len(sites) == 2
    pruned = mfcompile.prune_tokens(captured, {site.name: 0.6 for site in sites})
    artifact = mfcompile.export_onnx(pruned, tmp_path / "fewer.onnx")
    report = mfcompile.verify(artifact, pruned)
    assert report.passed
    assert largest_difference(report) < 1e-4
    dense = mfcompile.export_onnx(captured, tmp_path / "dense.onnx")
    own = {"NonZero"} if family is llava_like else set()  # placing image tokens in text, with cuts or without
    assert operators(artifact.path) & DYNAMIC == operators(dense.path) & DYNAMIC == own
    assert all(name.startswith("batch") for name in free_dimensions(artifact.path))


@pytest.mark.parametrize("options", [{"scorer": "cls_attention"}, {"scorer": "random", "rest": "merge"}, {"restore": "last"}])
def test_every_option_becomes_plain_operators(options: dict[str, Any], tmp_path: Path) -> None:
    pool = "all" if "restore" in options else "cls"
    captured = fixed(seeded(lambda: Encoder(pool=pool)), {"image": patches()})
    pruned = mfcompile.prune_tokens(captured, {"blocks.0.attention": 6, "blocks.1.attention": 4}, **options)
    artifact = mfcompile.export_onnx(pruned, tmp_path / "fewer.onnx")
    assert mfcompile.verify(artifact, pruned).passed
    assert not operators(artifact.path) & DYNAMIC
    assert artifact.dynamic_axes == {"image": {0: "batch"}}


def test_of_equal_scores_onnxruntime_keeps_what_the_module_does(tmp_path: Path) -> None:
    """Two values of scores, so that most of the choice is between equal ones; a score that differs decides."""

    def score(evidence: TokenEvidence) -> torch.Tensor:
        return (evidence.states[..., 0] > 0).float()

    captured = fixed(seeded(lambda: Encoder(pool="all")), {"image": patches()})
    pruned = mfcompile.prune_tokens(captured, {"blocks.0.attention": 5}, scorer=score, outputs="shorter")
    artifact = mfcompile.export_onnx(pruned, tmp_path / "ties.onnx")
    session = onnxruntime.InferenceSession(artifact.path)
    states: list[torch.Tensor] = []
    block = captured.module.get_submodule("blocks.0")
    handle = block.get_submodule("norms.1").register_forward_pre_hook(lambda _, given: states.append(given[0]))
    for seed in range(8):
        image = patches(seed=seed)
        with torch.no_grad():
            wanted = pruned.module(image=image)["output_0_kept"]
            captured.module(image=image)
        (found,) = session.run(["output_0_kept"], {"image": image.numpy()})
        assert torch.equal(torch.from_numpy(found), wanted)
        for row, high in zip(wanted.tolist(), (states[-1][..., 0] > 0).tolist(), strict=True):
            best = sorted(range(1, 10), key=lambda token, high=high: (not high[token], token))[:4]  # type: ignore[misc]
            assert row == sorted([0, *best])  # CLS, those of the higher score, and the first of the others
    handle.remove()


def test_masks_and_cuts_go_into_one_file(tmp_path: Path) -> None:
    captured = fixed(seeded(Encoder), {"image": patches()})
    pruned = mfcompile.prune_tokens(captured, {"blocks.0.attention": 5})
    regions = mfcompile.infer_regions(pruned)
    masks = mfcompile.select_masks(pruned, regions, mfcompile.calibrate(pruned, regions=regions), sparsity=0.5)
    masked = mfcompile.apply_masks(pruned, masks)
    artifact = mfcompile.export_onnx(masked, tmp_path / "both.onnx")
    assert mfcompile.verify(artifact, masked).passed
    assert not mfcompile.verify(artifact, pruned).passed  # it is the masked model's, and no other's


@pytest.mark.slow
def test_a_model_with_a_free_text_length_keeps_it_where_only_the_image_is_cut(tmp_path: Path) -> None:
    model, batch = clip_like()
    pruned = mfcompile.prune_tokens(mfcompile.capture(model, batch), {"vision_model.encoder.layers.1.self_attn": 0.5})
    artifact = mfcompile.export_onnx(pruned, tmp_path / "fewer.onnx")
    assert artifact.dynamic_axes["input_ids"] == {0: "batch", 1: "sequence"}
    assert list(artifact.dynamic_axes["pixel_values"]) == [0]
    longer = {
        name: tensor[:, [0, *range(tensor.shape[1])]] if name != "pixel_values" else tensor for name, tensor in batch.items()
    }
    with torch.no_grad():
        assert pruned.module(**longer).text_model_output.last_hidden_state.shape == (2, 13, 32)
