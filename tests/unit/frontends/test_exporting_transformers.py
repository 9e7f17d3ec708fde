"""The rung of transformers' own exporters: constants instead of inputs, patches undone, absence told."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from mfcompile.errors import CaptureError
from mfcompile.frontends.capture import capture
from mfcompile.frontends.exporting import candidates
from mfcompile.frontends.exporting_transformers import prepared_model
from mfcompile.graph import CaptureAttempt, ExportedModel
from mfcompile.inputs import normalize_inputs

BEFORE = "torch.export, shapes fixed"


class Config(transformers.PretrainedConfig):  # type: ignore[no-untyped-call]
    model_type = "test-positions"


class Positions(nn.Module):
    def get_rope_index(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = [[float(index * (token > 2)) for index, token in enumerate(row)] for row in input_ids.tolist()]
        return torch.tensor(rows), torch.zeros(1)


class HostPositions(transformers.PreTrainedModel):  # type: ignore[no-untyped-call]
    """Reads its tokens on the host where it is given no positions."""

    config_class = Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = Positions()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, image: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids, _ = self.inner.get_rope_index(input_ids)
        hidden = self.table(input_ids) + position_ids.unsqueeze(-1)
        return torch.where(hidden > 0, hidden, 0.0) + image


def host_model() -> Any:
    model: Any = HostPositions(Config())
    return model.eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[3, 4, 1, 5], [6, 7, 1, 8]])
    return {"input_ids": ids, "image": torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0))}


def rung(model: nn.Module) -> tuple[CaptureAttempt, ExportedModel | None]:
    attempt, found = next(iter(candidates(capture(model, inputs()), after=BEFORE)))
    assert attempt.frontend == "transformers.exporters"
    return attempt, found


def test_positions_are_computed_beforehand_and_are_no_inputs() -> None:
    model = host_model()
    attempts = {attempt.frontend: attempt for attempt, _ in candidates(capture(model, inputs()))}
    assert not attempts["torch.export"].succeeded
    assert "get_rope_index: rows = " in attempts["torch.export"].detail or "tolist" in attempts["torch.export"].detail
    attempt, found = rung(model)
    assert found is not None, attempt
    assert found.input_names == ("input_ids", "image")
    assert len(found.program.graph_signature.user_inputs) == 2
    assert any(note.startswith("position_ids: computed beforehand") for note in found.notes)
    given = inputs() | {"image": torch.ones(2, 1, 4)}
    with torch.no_grad():
        torch.testing.assert_close(found.program.module()(**given), model(**given))
    assert found.program.state_dict["table.weight"].data_ptr() == model.table.weight.data_ptr()


def test_patches_are_gone_afterwards() -> None:
    from torch.utils import _pytree as pytree

    model = host_model()
    given = normalize_inputs(model, inputs())
    functions = [torch.where, torch.Tensor.view, nn.functional.scaled_dot_product_attention, model.forward.__func__]
    registered = set(pytree.SUPPORTED_NODES)
    with prepared_model(model, given):
        assert torch.where is not functions[0]
    with pytest.raises(RuntimeError, match="stop"), prepared_model(model, given):
        raise RuntimeError("stop")
    assert [
        torch.where,
        torch.Tensor.view,
        nn.functional.scaled_dot_product_attention,
        model.forward.__func__,
    ] == functions
    assert set(pytree.SUPPORTED_NODES) == registered


def test_a_library_without_exporters_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters", None)
    attempt, found = rung(host_model())
    assert found is None
    assert "this transformers has no exporters" in attempt.detail


def test_other_models_are_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor, image: Tensor) -> Tensor:
            return image + input_ids.sum()

    attempt, found = rung(Plain())
    assert found is None
    assert "not one of transformers" in attempt.detail
    with pytest.raises(CaptureError), prepared_model(Plain(), normalize_inputs(Plain(), inputs())):
        pass
