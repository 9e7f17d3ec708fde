from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfcompile.exporters.program import prepare_program, tensor_aliases, tensor_input_nodes
from tests.unit.exporters.toy_models import Tied, seeded


class Checked(nn.Module):
    """Assertions fed by chains of operators, one of which the output reads as well; a buffer that forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, input: Tensor, flag: bool = True, other: Tensor | None = None) -> dict[str, Any]:
        finite = torch.isfinite(input)
        torch.ops.aten._assert_async.msg(torch.ops.aten._is_all_true(finite), "not finite")
        self.calls.add_(1)
        return {"y": self.layer(input), "finite": finite, "none": other, "number": 7, "size": input.shape[0]}


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Checked().eval(), (torch.randn(2, 3),), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}})


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_assertions_go_with_what_only_they_use(program: torch.export.ExportedProgram) -> None:
    assert "aten._is_all_true.default" in operators(program)
    prepared = prepare_program(program)
    left = operators(prepared)
    assert not [name for name in left if "assert" in name or "_is_all_true" in name or "item" in name]
    assert len([name for name in left if name.startswith("aten.linear")]) == 1


def test_only_tensors_are_returned_and_the_values_are_the_same(program: torch.export.ExportedProgram) -> None:
    prepared = prepare_program(program)
    x = torch.randn(5, 3)
    expected = program.module()(x)
    y, finite = prepared.module()(x)
    assert torch.equal(y, expected["y"])
    assert torch.equal(finite, expected["finite"])


def test_the_given_program_is_not_changed_and_tensors_are_shared(program: torch.export.ExportedProgram) -> None:
    before = (str(program.graph), str(program.graph_signature), str(program.module_call_graph))
    prepared = prepare_program(program)
    assert (str(program.graph), str(program.graph_signature), str(program.module_call_graph)) == before
    assert str(prepared.graph) != before[0]
    weight = prepared.state_dict["layer.weight"]
    assert weight.data_ptr() == program.state_dict["layer.weight"].data_ptr()


def test_inputs_that_are_no_tensors_have_no_name(program: torch.export.ExportedProgram) -> None:
    assert tensor_input_nodes(program) == ("input",)
    assert tensor_input_nodes(prepare_program(program)) == ("input",)


def test_aliases_are_names_of_one_tensor() -> None:
    program = torch.export.export(seeded(Tied), (torch.zeros(1, 2, dtype=torch.int64),))
    aliases = tensor_aliases(program)
    assert set(aliases["head.weight"]) == set(aliases["embedding.weight"]) == {"head.weight", "embedding.weight"}
    assert aliases["middle.bias"] == ("middle.bias",)
