"""Joint pruning of whole models: CLIP-, BLIP- and LLaVA-like ones, and one that nothing here was written for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.comp.loss import OutputLoss
from mfcompile.comp.modes import UnitMode
from mfcompile.comp.one_shot import prune_jointly
from mfcompile.comp.refit import refit_outputs, with_fewer_tokens
from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.structure import repeat_structure
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import output_tensors
from mfcompile.passes.flops import count_flops
from mfcompile.passes.weight_values import with_values
from mfcompile.structure import kept_inputs
from tests.token_models import Batch, Block, Encoder, blip_like, clip_like, llava_like, patches, seeded


class Listener(nn.Module):
    """Sound and text, each with blocks of its own; sound is written out as squares, text is read as a mean."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.hear, self.table = nn.Linear(6, width), nn.Embedding(50, width)
        self.ears = nn.ModuleList([Block(width, 2, "written") for _ in range(2)])
        self.words = nn.ModuleList([Block(width, 4) for _ in range(2)])
        self.head = nn.Linear(2 * width, 5, bias=False)

    def forward(self, audio: Tensor, input_ids: Tensor) -> Tensor:
        sound, text = self.hear(audio), self.table(input_ids)
        for block in self.ears:
            sound = block(sound)
        for block in self.words:
            text = block(text)
        result: Tensor = self.head(torch.cat([sound.mean(1), text.mean(1)], dim=-1))
        return result


def listener() -> tuple[Any, Batch]:
    generator = torch.Generator().manual_seed(0)
    sound = torch.randn(2, 20, 6, generator=generator)
    return seeded(Listener), {"audio": sound, "input_ids": torch.randint(0, 50, (2, 7), generator=generator)}


FAMILIES = {"clip": clip_like, "blip": blip_like, "llava": llava_like, "listener": listener}

MODES = {
    "clip": ["parameters:vision", "parameters:text", "tokens:vision"],
    "blip": ["parameters:vision", "parameters:fusion", "tokens:vision"],
    "llava": ["parameters:vision", "parameters:fusion", "tokens:vision", "tokens:vision@fusion"],
    "listener": ["parameters:audio", "parameters:text", "tokens:audio"],
}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "listener" else pytest.mark.slow) for name in FAMILIES]
)
def pruned(request: pytest.FixtureRequest) -> tuple[str, JointlyPruned]:
    """Every mode of a model in turn, so that none is left out."""
    model, batch = FAMILIES[request.param]()
    captured = mfcompile.capture(model, batch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = prune_jointly(captured, flops=0.6, options={"strategy": "fixed", "step": 0.12})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return request.param, found


def flops_of(captured: CapturedGraph) -> int:
    assert captured.exported is not None
    return count_flops(captured.exported.program).total


def outputs(captured: CapturedGraph) -> dict[str, Tensor]:
    with torch.no_grad():
        return output_tensors(captured.example_inputs.call(captured.module))


def test_a_model_lands_at_the_target_by_modes_of_its_own(pruned: tuple[str, JointlyPruned]) -> None:
    name, found = pruned
    assert [mode.name for mode in found.modes] == MODES[name]
    assert [stage.mode for stage in found.stages][:3] == MODES[name][:3]
    assert found.flops == (flops_of(found.dense), flops_of(found.captured))
    assert found.flops[1] / found.flops[0] == pytest.approx(0.6, rel=0.01)
    assert found.stages[-1].flops == found.flops[1] / found.flops[0]
    assert found.structure.removed
    assert found.structure.kept
    told = str(found)
    assert told.startswith(f"JointlyPruned({type(found.dense.module).__name__}, {found.stages[-1].flops:.3f} of the FLOPs, ")
    assert all(name in told for name in (*found.structure.removed, *found.structure.kept))
    for old, new in zip(outputs(found.dense).values(), outputs(found.captured).values(), strict=True):
        assert old.shape == new.shape
        assert not torch.equal(old, new)


def test_what_was_taken_can_be_taken_again(pruned: tuple[str, JointlyPruned]) -> None:
    _, found = pruned
    again = found.structure.apply(found.dense)
    for first, second in zip(outputs(found.captured).values(), outputs(again).values(), strict=True):
        assert torch.equal(first, second)
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report["label"] == "CoMP-style, one-shot: not the paper's training recipe"
    assert report["digest"] == found.structure.digest()
    saved = sum(row["flops_saved"] for row in report["modes"])
    assert saved == pytest.approx(1 - report["flops"]["share"])
    assert report["parameters"]["left"] == sum(item.numel() for item in found.module.parameters())
    gone = sum(unit["removed"] for row in report["modes"] for unit in row.get("units", ()))
    assert gone == sum(len(elements) for elements in found.structure.removed.values())


def test_onnxruntime_computes_what_is_left(pruned: tuple[str, JointlyPruned], tmp_path: Path) -> None:
    _, found = pruned
    artifact = mfcompile.export_onnx(found.captured, tmp_path / "smaller.onnx")
    report = mfcompile.verify(artifact, found.captured)
    assert report.passed
    assert report.max_abs_diff < 1e-4


def test_masks_go_on_what_is_left(pruned: tuple[str, JointlyPruned], tmp_path: Path) -> None:
    name, found = pruned
    if name not in ("clip", "listener"):
        pytest.skip("two models are enough to tell")
    regions = mfcompile.infer_regions(found.captured)
    statistics = mfcompile.calibrate(found.captured, regions=regions)
    masked = mfcompile.apply_masks(found.captured, mfcompile.select_masks(found.captured, regions, statistics, sparsity=0.5))
    artifact = mfcompile.export_onnx(masked, tmp_path / "both.onnx")
    assert mfcompile.verify(artifact, masked).passed


def test_output_weights_can_be_refitted_after_the_search(pruned: tuple[str, JointlyPruned], tmp_path: Path) -> None:
    _, plain = pruned
    batches = [plain.dense.example_inputs]
    measure = OutputLoss(plain.dense.module, batches)
    refit = refit_outputs(plain, batches, measure, None, None)
    assert (refit.stages, refit.structure.removed) == (plain.stages, plain.structure.removed)
    assert refit.refit is not None
    assert refit.refit["loss"] == measure(refit.module)
    assert refit.refit["loss"] < 0.9 * plain.stages[-1].loss
    lost = {
        unit.output_weight
        for mode in plain.modes
        if isinstance(mode, UnitMode)
        for unit in mode.units
        if plain.structure.removed.get(unit.name)
    }
    assert {name for name, row in refit.refit["weights"].items() if row["error"] < 1} == lost
    assert lost <= set(refit.structure.refitted)
    own = dict(refit.module.named_parameters())
    for fqn, parameter in plain.module.named_parameters():
        assert parameter.shape == own[fqn].shape
        assert torch.equal(parameter, own[fqn]) is (fqn not in refit.structure.refitted)
    report = json.loads(json.dumps(refit.report(), allow_nan=False))
    assert report["refit"]["loss"] == refit.refit["loss"]
    assert report["digest"] == refit.structure.digest() != plain.structure.digest()
    artifact = mfcompile.export_onnx(refit.captured, tmp_path / "refit.onnx")
    assert mfcompile.verify(artifact, refit.captured).passed


def test_it_is_solved_on_the_tokens_that_are_left(pruned: tuple[str, JointlyPruned]) -> None:
    _, plain = pruned
    seen = with_fewer_tokens(plain.dense, plain.structure, None)
    kept, _ = kept_inputs(plain.dense, plain.structure.removed)
    zeros = with_values(seen, {fqn: torch.where(mask, seen.parameter(fqn).detach(), 0.0) for fqn, mask in kept.items()})
    for first, second in zip(outputs(plain.captured).values(), outputs(zeros).values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def encoder() -> CapturedGraph:
    captured = mfcompile.capture(seeded(Encoder), {"image": patches()})
    return mfcompile.with_token_program(captured)


def trace_of(captured: CapturedGraph, **options: Any) -> list[dict[str, Any]]:
    return [stage.as_dict() for stage in prune_jointly(captured, flops=0.75, options={"step": 0.1, **options}).stages]


def test_the_same_seed_gives_the_same_trace(encoder: CapturedGraph) -> None:
    options: dict[str, Any] = {"strategy": "comp", "exploration": 0.5, "at": 0.0}
    assert trace_of(encoder, **options) == trace_of(encoder, **options)


def test_the_users_measure_decides(encoder: CapturedGraph) -> None:
    def evaluate(module: nn.Module) -> dict[str, float]:
        """Every channel or head that is gone, or zeroed, costs; tokens are free."""
        names = [f"blocks.{block}.{name}.weight" for block in (0, 1) for name in ("down", "attention.out")]
        weights = [module.get_parameter(name) for name in names]
        return {"kept": float(sum((weight != 0).sum() for weight in weights))}

    found = prune_jointly(encoder, flops=0.85, evaluate=evaluate, options={"step": 0.1, "scorer": "magnitude", "at": 0.0})
    first = found.stages[0]
    assert (first.mode, first.loss) == ("tokens:vision", 0)
    assert first.tried["parameters:vision"] > 0


def test_some_modes_can_be_chosen(encoder: CapturedGraph) -> None:
    found = prune_jointly(encoder, flops=0.8, options={"modes": "parameters:vision", "step": 0.1, "loss": "kl"})
    assert {stage.mode for stage in found.stages} == {"parameters:vision"}
    assert found.flops[1] / found.flops[0] == pytest.approx(0.8, rel=0.01)


def test_refitted_values_go_beside_the_file(encoder: CapturedGraph) -> None:
    options = {"modes": "parameters:vision", "step": 0.1, "scorer": "magnitude", "refit": True}
    found = prune_jointly(encoder, flops=0.8, options=options)
    assert found.captured.exported is not None
    metadata = found.captured.exported.metadata
    values = {fqn: found.captured.parameter(fqn) for fqn in found.structure.refitted}
    again = repeat_structure(encoder, metadata, refitted=values)
    assert again is not None
    for first, second in zip(outputs(found.captured).values(), outputs(again).values(), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(InputError, match=r"was refitted after units were removed, .* give it with --masks"):
        repeat_structure(encoder, metadata)
    name = found.structure.refitted[0]
    with pytest.raises(InputError, match=rf"the refitted {name} is \(1,\), the model's .* of another model"):
        repeat_structure(encoder, metadata, refitted={**values, name: torch.zeros(1)})


def test_seconds_can_be_what_costs_are_divided_by(encoder: CapturedGraph) -> None:
    one_mode = {"modes": "parameters:vision", "scorer": "random"}  # every step that is tried is exported
    found = prune_jointly(encoder, flops=0.9, options={"cost": "latency", "step": 0.1, **one_mode})
    assert all(0 < stage.spent < 10 for stage in found.stages)
    assert found.stages[0].spent != found.stages[0].flops
    assert found.report()["seconds_share"] == found.stages[-1].spent


def test_the_stages_are_a_picture(encoder: CapturedGraph, tmp_path: Path) -> None:
    found = prune_jointly(encoder, flops=0.8, options={"step": 0.1, "modes": "parameters:vision", "scorer": "magnitude"})
    png, svg = found.plot(tmp_path)
    first = svg.read_bytes()
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert found.plot(tmp_path)[1].read_bytes() == first


def test_a_target_out_of_reach_says_what_is_in_reach(encoder: CapturedGraph) -> None:
    with pytest.raises(InputError, match=r"flops=0\.05 cannot be reached: with all of parameters:vision, tokens:vision gone"):
        prune_jointly(encoder, flops=0.05)
    caps = {"parameters:vision": 0.1, "tokens:vision": 0.1}
    with pytest.raises(InputError, match=r"the caps are \{'parameters:vision': 0\.1, .*Ask for 0\.\d+ or more, raise caps"):
        prune_jointly(encoder, flops=0.5, options={"caps": caps})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepp": 0.1}, "joint pruning has no option 'stepp'; it has strategy, cost, step"),
        (
            {"modes": ["tokens:sound"]},
            "there is no mode 'tokens:sound'; this model's modes are parameters:vision, tokens:vision",
        ),
        ({"caps": {"tokens:vision": 2}}, r"caps\['tokens:vision'\] is 2: give the share"),
        ({"cost": "energy"}, "cost='energy' is not known; choose one of flops, latency"),
        ({"scorer": "best"}, "scorer='best' is not known"),
        ({"token_scorer": "best"}, "best"),
        ({"refit": "yes"}, "refit='yes' is neither true nor false"),
    ],
)
def test_options_that_cannot_be_are_refused(encoder: CapturedGraph, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune_jointly(encoder, options=options)


def test_a_batch_of_other_lengths_is_refused(encoder: CapturedGraph) -> None:
    with pytest.raises(InputError, match=r"calibration batch 0 \(image \(3, 4, 16\)\) does not run"):
        prune_jointly(encoder, calibration=[{"image": patches(3, 4)}])


def test_a_batch_that_only_the_whole_model_runs_is_refused() -> None:
    model, batch = listener()
    longer = {**batch, "audio": torch.cat([batch["audio"]] * 2, dim=1)}
    model(**longer)
    with pytest.raises(InputError, match=r"calibration batch 0 \(audio \(2, 40, 6\), .* give batches of these lengths"):
        prune_jointly(mfcompile.capture(model, batch), calibration=[longer])


def test_masks_come_after(encoder: CapturedGraph) -> None:
    regions = mfcompile.infer_regions(encoder)
    masks = mfcompile.select_masks(encoder, regions, sparsity=0.5, criterion="magnitude")
    with pytest.raises(InputError, match="prune units and tokens first, and mask what is left"):
        prune_jointly(mfcompile.apply_masks(encoder, masks))
