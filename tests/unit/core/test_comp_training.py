"""Pruning inside fine-tuning: what is trained, what fades, what is taken out, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.trained_space import TrainingOptions
from mfcompile.comp.training import train_jointly
from mfcompile.errors import InputError
from mfcompile.passes.flops import count_flops
from tests.token_models import Encoder, patches, seeded

IMAGE = {"image": patches()}
STAGES = TrainingOptions(stage_steps=6, recovery_steps=0)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Images, and the outputs of a linear teacher on them."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, *IMAGE["image"].shape[1:], generator=generator)
    teacher = torch.randn(images[0].numel(), 3, generator=torch.Generator().manual_seed(99)) / images[0].numel() ** 0.5
    return images, images.flatten(1) @ teacher


BATCHES = [batch(seed) for seed in range(6)]


def error(module: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
    output = module(image=one[0])
    return F.mse_loss(output.flatten(1)[:, :3], one[1])


def skill(module: nn.Module) -> float:
    with torch.no_grad():
        return -float(sum(error(module, one) for one in BATCHES[:2])) / 2


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def trained(model: nn.Module, **changes: Any) -> JointlyPruned:
    given: dict[str, Any] = {
        "flops": 0.6, "loss_fn": error, "batches": BATCHES, "evaluate": skill, "optimizer": sgd, "training": STAGES,
        "options": {"step": 0.2, "mode_step": 1.0},
    }  # fmt: skip
    return train_jointly(model, IMAGE, **(given | changes))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made: nn.Module = seeded(Encoder)
    return made


@pytest.fixture(scope="module")
def done(model: nn.Module) -> JointlyPruned:
    return trained(model)


@pytest.fixture(scope="module")
def recovered(model: nn.Module) -> JointlyPruned:
    """The same once more, trained on behind its last stage."""
    return trained(model, training=TrainingOptions(stage_steps=STAGES.stage_steps, recovery_steps=40))


def test_it_lands_on_the_target(done: JointlyPruned) -> None:
    assert done.flops[1] / done.flops[0] == pytest.approx(0.6, rel=0.01)
    assert done.captured.exported is not None
    assert count_flops(done.captured.exported.program).total == done.flops[1]
    assert len({stage.mode for stage in done.stages}) == 2


def test_what_faded_is_what_is_taken_out(done: JointlyPruned, model: nn.Module) -> None:
    """The smaller module computes what the faded one did when its last stage was measured."""
    assert done.training is not None
    assert done.training["loss"] == pytest.approx(done.stages[-1].loss, rel=1e-4)
    lost = skill(model) - skill(done.module)
    assert lost == pytest.approx(done.stages[-1].loss, rel=1e-4)
    assert sum(parameter.numel() for parameter in done.module.parameters()) < sum(item.numel() for item in model.parameters())


def test_the_stages_train(done: JointlyPruned, model: nn.Module) -> None:
    assert skill(done.module) > skill(model) + 0.1  # smaller, and it learned the task on the way
    grown = [name for name, item in done.module.named_parameters() if name.endswith("norm.weight")]
    assert grown
    assert all(not torch.equal(done.module.get_parameter(name), model.get_parameter(name)) for name in grown)


def test_the_users_model_is_left_alone(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    trained(model, flops=0.85)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_doomed_fades_linearly_and_stays_gone(model: nn.Module) -> None:
    """With a learning rate of zero nothing but fading moves weights."""
    seen: list[float] = []

    def watched(module: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(float(module.get_parameter("blocks.0.down.weight").detach().abs().sum()))
        return error(module, one)

    frozen = trained(
        model,
        loss_fn=watched,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        options={"step": 0.1, "modes": ("parameters:vision",), "strategy": "fixed"},
        flops=0.8,
    )
    first = seen[: STAGES.stage_steps]
    falls = [before - after for before, after in itertools.pairwise(first)]
    assert falls[0] > 0
    assert falls == pytest.approx([falls[0]] * len(falls), rel=1e-3)
    for name in ("blocks.1.up.weight",):
        kept = frozen.module.get_parameter(name)
        assert kept.shape[0] < model.get_parameter(name).shape[0]
        assert all(any(torch.equal(row, dense) for dense in model.get_parameter(name)) for row in kept)


def test_what_is_gone_does_not_come_back_while_later_stages_train(model: nn.Module) -> None:
    """Neither the gradient nor momentum nor weight decay moves a column that faded in an earlier stage."""
    empty: list[int] = []

    def watched(module: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
        weights = [module.get_submodule(f"blocks.{number}.down").weight for number in (0, 1)]
        empty.append(sum(int((weight == 0).all(dim=0).sum()) for weight in weights if isinstance(weight, Tensor)))
        return error(module, one)

    only_units = {"step": 0.1, "modes": ("parameters:vision",), "strategy": "fixed"}
    trained(model, loss_fn=watched, options=only_units, flops=0.8)
    stages = [empty[start : start + STAGES.stage_steps] for start in range(0, len(empty), STAGES.stage_steps)]
    assert len(stages) > 1
    assert set(stages[0]) == {0}  # fading, and none gone yet
    for stage in stages[1:]:
        assert stage[0] > 0
        assert set(stage) == {stage[0]}


def test_recovery_trains_the_smaller_module(recovered: JointlyPruned, model: nn.Module) -> None:
    assert recovered.training is not None
    assert recovered.training["loss"] < recovered.stages[-1].loss
    assert recovered.training["loss"] == pytest.approx(skill(model) - skill(recovered.module), abs=1e-6)


def test_the_same_seed_gives_the_same_stages(done: JointlyPruned, recovered: JointlyPruned) -> None:
    assert recovered.structure == done.structure
    assert recovered.stages == done.stages


def nan(module: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
    return error(module, one) * float("nan")


def used_up() -> Iterator[tuple[Tensor, Tensor]]:
    yield from BATCHES[:2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {"strategy": "probe"}}, "strategy='probe' takes steps back"),
        ({"options": {"cost": "latency"}}, "costs are per FLOPs"),
        ({"batches": used_up()}, "batches has nothing (more) to train on"),
        ({"batches": []}, "batches has nothing"),
        ({"loss_fn": nan}, "the loss is nan at a step of training"),
        ({"loss_fn": lambda module, one: 1.0}, "loss_fn gave a float"),
        ({"loss_fn": lambda module, one: error(module, one).detach()}, "without a gradient"),
        ({"evaluate": lambda module: {}}, "evaluate gave no number"),
        ({"flops": 0.001}, "cannot be reached"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: nn.Module, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as failure:
        trained(model, **changes)
    assert said in str(failure.value)


@pytest.mark.parametrize("changes", [{"stage_steps": 0}, {"recovery_steps": -1}, {"stage_steps": 1.5}, {"clip": 0.0}])
def test_numbers_of_steps_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        TrainingOptions(**changes)
