"""How much worse a pruned model is said to be: by its outputs, against formulas written out, and by the user's measure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfcompile.comp.loss import OutputLoss, calibration_inputs, evaluation_loss
from mfcompile.errors import CalibrationError, InputError


class Gives(nn.Module):
    """Gives what it was told to, whatever it is asked."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor[: rows.shape[0]] for name, tensor in self.outputs.items()}


def loss_between(dense: dict[str, Tensor], pruned: dict[str, Tensor], **options: Any) -> float:
    model = Gives(**dense)
    batches = calibration_inputs(model, [{"rows": torch.zeros(len(next(iter(dense.values()))))}])
    return OutputLoss(model, batches, **options)(Gives(**pruned))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_one_minus_the_cosine_of_every_sample() -> None:
    dense, pruned = random(3, 4), random(3, 4, seed=1)
    by_hand = []
    for one, other in zip(dense.tolist(), pruned.tolist(), strict=True):
        product = sum(a * b for a, b in zip(one, other, strict=True))
        by_hand.append(1 - product / math.hypot(*one) / math.hypot(*other))
    assert loss_between({"x": dense}, {"x": pruned}) == pytest.approx(sum(by_hand) / 3)
    assert loss_between({"x": dense}, {"x": dense}) == pytest.approx(0, abs=1e-12)
    assert loss_between({"x": dense}, {"x": -dense}) == pytest.approx(2)


def test_the_loss_is_the_divergence_of_the_softmax() -> None:
    dense, pruned = random(2, 3, 5), random(2, 3, 5, seed=1)
    by_hand = []
    for one, other in zip(dense.flatten(0, 1).tolist(), pruned.flatten(0, 1).tolist(), strict=True):
        p, q = ([math.exp(item) / sum(map(math.exp, row)) for item in row] for row in (one, other))
        by_hand.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert loss_between({"x": dense}, {"x": pruned}, kind="kl") == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_outputs_count_alike_and_some_can_be_left_out() -> None:
    dense = {"same": random(2, 4), "other": random(2, 4), "ids": torch.arange(2)}
    pruned = {**dense, "other": -dense["other"]}
    assert loss_between(dense, pruned) == pytest.approx(1)
    assert loss_between(dense, pruned, outputs=["same"]) == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match=r"there is no output 'ids' .*; the outputs of Gives are same, other"):
        loss_between(dense, pruned, outputs=["ids"])


def test_tokens_that_were_dropped_are_not_compared() -> None:
    dense = random(2, 3, 4)
    pruned = dense.clone()
    pruned[0, 1] = 0
    pruned[1, 2] = 0
    assert loss_between({"states": dense}, {"states": pruned}) == pytest.approx(0, abs=1e-12)
    pruned[0, 2] *= -1
    kept = dense[0, [0, 2]].flatten(), torch.cat([dense[0, 0], -dense[0, 2]])
    cosine = float(torch.nn.functional.cosine_similarity(*kept, dim=0))
    assert loss_between({"states": dense}, {"states": pruned}) == pytest.approx((1 - cosine) / 2, rel=1e-5)


def test_a_sample_of_which_nothing_is_left_is_lost() -> None:
    dense = random(2, 3, 4)
    pruned = dense.clone()
    pruned[0] = 0
    assert loss_between({"states": dense}, {"states": pruned}) == pytest.approx(0.5)
    assert loss_between({"x": torch.zeros(2, 4)}, {"x": torch.zeros(2, 4)}) == 0  # nothing is as good as nothing


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_single_numbers_are_compared_over_samples(shape: tuple[int, ...]) -> None:
    dense, pruned = torch.tensor([1.0, 2.0, 2.0]).reshape(shape), torch.tensor([2.0, 2.0, 1.0]).reshape(shape)
    assert loss_between({"score": dense}, {"score": pruned}) == pytest.approx(1 - 8 / 9)


def test_infinity_and_nan_are_not_hidden() -> None:
    pruned = random(2, 4)
    pruned[0, 0] = math.nan
    assert math.isnan(loss_between({"x": random(2, 4)}, {"x": pruned}))


def test_the_users_measure_says_how_much_less_it_is() -> None:
    score = {1.0: 0.9, 2.0: 0.75}
    models = {value: Gives(x=torch.tensor([value])) for value in score}
    loss = evaluation_loss(lambda module: score[float(module.outputs["x"])], models[1.0])
    assert loss(models[1.0]) == 0
    assert loss(models[2.0]) == pytest.approx(0.15)
    several = evaluation_loss(lambda module: {"a": float(module.outputs["x"]), "b": 4.0}, models[2.0])
    assert several(models[1.0]) == pytest.approx(0.5)
    with pytest.raises(InputError, match="evaluate gave no number"):
        evaluation_loss(lambda module: {}, models[1.0])


def test_batches_are_taken_until_there_are_enough_samples() -> None:
    model = Gives(x=random(4, 2))
    batches = [{"rows": torch.zeros(2)}] * 5
    assert len(calibration_inputs(model, batches)) == 5
    assert len(calibration_inputs(model, batches, 3)) == 2
    with pytest.raises(CalibrationError, match="there is no calibration batch"):
        calibration_inputs(model, [])


def test_a_batch_that_does_not_run_says_so() -> None:
    model = nn.Linear(4, 2)
    batches = calibration_inputs(model, [torch.zeros(2, 4), torch.zeros(2, 5)])
    with pytest.raises(InputError, match=r"calibration batch 1 \(input \(2, 5\)\) does not run: RuntimeError"):
        OutputLoss(model, batches)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(InputError, match="choose one of cos, kl, or give evaluate="):
        loss_between({"x": random(2, 4)}, {"x": random(2, 4)}, kind="l2")
