"""Pruning inside fine-tuning of a whole model: a CLIP-like one of transformers, all of its modes, up to onnxruntime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.comp.result import JointlyPruned
from tests.token_models import Batch, clip_like


def contrastive(module: nn.Module, batch: Batch) -> Tensor:
    logits = module(**batch).logits_per_image
    return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


@pytest.fixture(scope="module")
def pruned() -> JointlyPruned:
    model, batch = clip_like()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def skill(module: nn.Module) -> float:
        with torch.no_grad():
            return -contrastive(module, batch).item()

    done = mfcompile.train_jointly(
        model,
        batch,
        flops=0.6,
        loss_fn=contrastive,
        batches=[batch],
        evaluate=skill,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        training=mfcompile.TrainingOptions(stage_steps=3, recovery_steps=4),
        options={"strategy": "fixed", "step": 0.15, "mode_step": 0.5},
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return done


def test_every_mode_has_its_turn_and_the_end_is_near_the_target(pruned: JointlyPruned) -> None:
    assert {stage.mode for stage in pruned.stages} == {"parameters:vision", "parameters:text", "tokens:vision"}
    assert pruned.flops[1] / pruned.flops[0] == pytest.approx(0.6, rel=0.01)


def test_training_went_on_over_what_is_left(pruned: JointlyPruned) -> None:
    """On the smaller module, all of which can be trained."""
    assert pruned.training is not None
    assert pruned.training["loss"] < pruned.stages[-1].loss
    sizes = [parameter.numel() for parameter in pruned.module.parameters()]
    assert sum(sizes) < sum(parameter.numel() for parameter in pruned.dense.module.parameters())
    assert all(parameter.requires_grad for parameter in pruned.module.parameters())


def test_the_smaller_model_runs_in_onnxruntime(pruned: JointlyPruned, tmp_path: Path) -> None:
    artifact = mfcompile.export_onnx(pruned.captured, tmp_path / "model.onnx")
    assert all(output.within for output in mfcompile.verify(artifact, pruned.captured).outputs)
