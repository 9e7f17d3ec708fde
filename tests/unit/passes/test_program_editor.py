"""Editing programs: sizes are computed once for operands of the same sizes, and nodes that share them stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from mfcompile.passes.program_editor import ProgramEditor


class Twins(nn.Module):
    """Two layers of the same sizes on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = self.left(x), self.right(x)
        return left, right, left.relu().sum(dim=1).add(1)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Twins().eval(), (torch.randn(3, 5, 4),), dynamic_shapes={"x": {0: Dim("batch")}})


def layers(editor: ProgramEditor) -> tuple[fx.Node, fx.Node]:
    left, right = (node for node in editor.graph.nodes if "linear" in str(node.target))
    return left, right


def test_operands_of_the_same_sizes_are_told_apart_in_what_is_put_in(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    left, right = layers(editor)
    editor.refresh(left)
    editor.refresh(right)
    assert left.meta["val"] is right.meta["val"], "computed once"
    (difference,) = editor.insert(lambda one, other: one - other, [left, right], right)
    assert difference.args == (left, right)
    editor.sort()
    changed = editor.finish({"difference": difference})
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = program.module()(x)
        assert torch.equal(changed.module()(x)["difference"], expected[0] - expected[1])


@pytest.mark.parametrize("other", [1.0, True])
def test_numbers_that_are_equal_and_of_another_kind_give_another_result(program: ExportedProgram, other: object) -> None:
    """An int added to ints gives ints, a float floats: 1, 1.0 and True must not stand for one another."""
    editor = ProgramEditor(program)
    (add,) = (node for node in editor.graph.nodes if "add" in str(node.target))
    source = add.args[0]
    assert isinstance(source, fx.Node)
    source.meta["val"] = source.meta["val"].to(torch.bool)
    found = []
    for number in (1, other):
        add.update_arg(1, number)
        editor.refresh(add)
        found.append(add.meta["val"].dtype)
    assert found == [torch.int64, torch.float32 if other == 1.0 and not isinstance(other, bool) else torch.bool]


def test_a_free_size_of_its_own_is_made_for_every_result(program: ExportedProgram) -> None:
    editor = ProgramEditor(program)
    left, right = layers(editor)
    with editor.graph.inserting_after(right):
        found = [editor.graph.call_function(torch.ops.aten.nonzero.default, (node,)) for node in (left, right)]
    for node in found:
        editor.refresh(node)
    first, second = (node.meta["val"].shape[0].node.expr for node in found)
    assert first != second
