"""Scores of structural units against loops over the equation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.unit_scores import (
    UNIT_SCORERS,
    random_unit_scores,
    resolve_unit_scorer,
    scorer_weighting,
    unit_magnitudes,
    unit_scores,
)


@dataclass(frozen=True)
class Made:
    """A unit as structured removal describes one; elements may own channels that do not lie side by side."""

    name: str
    output_weight: str
    owned: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return len(self.owned)

    def columns(self, element: int) -> Sequence[int]:
        return self.owned[element]


CHANNELS = Made("mlp", "mlp.down.weight", tuple((index,) for index in range(6)))
HEADS = Made("attention", "attention.out.weight", ((0, 1, 6, 7), (2, 3, 4, 5)))
WEIGHTS = {
    "mlp.down.weight": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "attention.out.weight": torch.randn(5, 8, generator=torch.Generator().manual_seed(1)),
}
NORMS = {
    "mlp.down.weight": torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    "attention.out.weight": torch.rand(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
}


def by_hand(unit: Made, norms: dict[str, torch.Tensor] | None) -> list[float]:
    """Eq. 3 in loops: i counts input channels of W_out, j its d outputs."""
    weight = WEIGHTS[unit.output_weight].double().numpy()
    outputs, inputs = weight.shape
    channel = []
    for i in range(inputs):
        mean = sum(abs(weight[j, i]) for j in range(outputs)) / outputs
        channel.append(mean * (1.0 if norms is None else float(norms[unit.output_weight][i])))
    return [float(np.mean([channel[i] for i in columns])) for columns in unit.owned]


@pytest.mark.parametrize("unit", [CHANNELS, HEADS], ids=["channels", "heads"])
def test_scores_are_eq_3(unit: Made) -> None:
    found = unit_scores([CHANNELS, HEADS], WEIGHTS, NORMS)
    assert list(found) == ["mlp", "attention"]
    assert found[unit.name].tolist() == pytest.approx(by_hand(unit, NORMS), rel=1e-12)
    assert unit_magnitudes([unit], WEIGHTS)[unit.name].tolist() == pytest.approx(by_hand(unit, None), rel=1e-12)


def test_norms_decide_where_weights_are_alike() -> None:
    weights = {"mlp.down.weight": torch.ones(4, 6)}
    order = unit_scores([CHANNELS], weights, NORMS)["mlp"].argsort()
    assert torch.equal(order, NORMS["mlp.down.weight"].argsort())
    assert len(set(unit_magnitudes([CHANNELS], weights)["mlp"].tolist())) == 1


def test_random_scores_differ_by_unit_and_seed_and_come_again() -> None:
    other = Made("other", "mlp.down.weight", CHANNELS.owned)
    both = random_unit_scores([CHANNELS, other])
    assert not torch.equal(both["mlp"], both["other"])
    assert torch.equal(both["mlp"], random_unit_scores([CHANNELS])["mlp"])
    assert not torch.equal(both["mlp"], random_unit_scores([CHANNELS], seed=1)["mlp"])


def test_scorers_by_name() -> None:
    for name in UNIT_SCORERS:
        found = resolve_unit_scorer(name)([CHANNELS, HEADS], WEIGHTS, NORMS)
        assert {key: len(value) for key, value in found.items()} == {"mlp": 6, "attention": 2}
    assert [scorer_weighting(name) for name in ("wanda", "cip", "magnitude", "random")] == ["none", "cip", None, None]
    with pytest.raises(InputError, match="scorer='taylor' is not known; choose one of wanda, cip, magnitude, random"):
        resolve_unit_scorer("taylor")
    with pytest.raises(InputError, match="scorer is a int"):
        resolve_unit_scorer(3)  # type: ignore[arg-type]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"unit mlp: mlp.down.weight has 6 input channels, and the norms hold none"):
        unit_scores([CHANNELS], WEIGHTS, {})
    with pytest.raises(CalibrationError, match=r"one of shape \(5,\)"):
        unit_scores([CHANNELS], WEIGHTS, {"mlp.down.weight": torch.ones(5)})
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        unit_scores([CHANNELS], WEIGHTS, {"mlp.down.weight": torch.full((6,), float("nan"))})
    with pytest.raises(InputError, match=r"its output weight mlp.down.weight is missing"):
        unit_scores([CHANNELS], {}, NORMS)
    with pytest.raises(InputError, match=r"element 0 names the channels \[6\]"):
        unit_scores([Made("mlp", "mlp.down.weight", ((6,),))], WEIGHTS, NORMS)
