"""Structured removal as a graph transform: elements of units taken out of weights, and out of every size that is listed.

::

    x --> linear(A, a) --> gelu --> linear(B, b)     ==>     x --> linear(A[kept], a[kept]) --> gelu --> linear(B[:, kept], b)
    view(q, [batch, tokens, 12, 64])                 ==>     view(q, [batch, tokens, 7, 64])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.base import PassResult
from mfcompile.passes.program_editor import ProgramEditor
from mfcompile.passes.structured_labels import dependent_axes
from mfcompile.passes.structured_sizes import Cuts, rewrite
from mfcompile.passes.structured_units import StructuralUnit, UnitPlan, plan_units
from mfcompile.passes.token_attention import ancestors
from mfcompile.passes.token_places import node_sizes, sizes

Kept = NDArray[np.bool_]


@dataclass(frozen=True)
class RemoveUnits:
    """Remove elements of structural units from the exported program of a graph.

    Attributes:
        remove: unit -> elements that go, by number.
        regions: FQN of a weight -> its region.
    """

    remove: Mapping[str, Sequence[int]]
    regions: Mapping[str, str]

    def requires(self, graph: CapturedGraph) -> None:
        """The graph is that of an exported program."""
        if graph.exported is None or graph.graph_module is not graph.exported.program.graph_module:
            raise PreconditionError(
                "structured removal rewrites exported programs: give the graph of one (see mfcompile.remove_units)"
            )

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph with a program without the elements; weights that lose nothing are shared."""
        assert graph.exported is not None  # ``requires`` looked
        program = graph.exported.program
        chosen = self.chosen(program)
        editor = ProgramEditor(program)
        cuts = _cuts(chosen, editor)
        _cut_stored(editor, cuts)
        _erase_unread(editor, cuts)
        _cut_beside(editor, chosen)
        rewrite(editor, cuts)
        result = editor.finish()
        notes = tuple(_describe(plan.unit, len(elements)) for plan, elements in chosen if elements)
        exported = replace(graph.exported, program=result, notes=(*graph.exported.notes, *notes))
        is_modified = str(result.graph) != str(program.graph)  # where no size is listed, only the weights are others
        return PassResult(replace(graph, graph_module=result.graph_module, exported=exported), is_modified)

    def chosen(self, program: ExportedProgram) -> list[tuple[UnitPlan, frozenset[int]]]:
        """The units that lose elements, and which.

        Raises:
            InputError: see ``mfcompile.remove_units``.
        """
        plans, refused = plan_units(program, self.regions)
        known = {plan.unit.name: plan for plan in plans}
        for name in self.remove:
            if name not in known:
                reasons = [str(item) for item in refused if item.name == name]
                raise InputError(
                    f"nothing can be removed of {name}: {reasons[0] if reasons else 'there is no unit of that name'}. Units "
                    f"are {', '.join(known) or 'none'}; find_units lists them with what is refused"
                )
        return [(known[name], checked_elements(known[name].unit, items)) for name, items in self.remove.items()]

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Inputs and outputs keep their sizes, fixed and free ones."""
        assert before.exported is not None  # ``requires`` looked
        assert result.graph.exported is not None  # ``apply`` made it
        old, new = (_contract(item.exported.program) for item in (before, result.graph))  # type: ignore[union-attr]
        if old != new:
            raise PostconditionError(f"inputs and outputs of sizes {old} became {new} by structured removal")


def kept_positions(transform: RemoveUnits, program: ExportedProgram) -> dict[str, dict[int, Kept]]:
    """FQN of every stored tensor that gets smaller -> dimension -> which of its positions stay."""
    cuts = _cuts(transform.chosen(program), ProgramEditor(program))
    targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs}
    return {targets[node.name]: dict(kept) for node, kept in cuts.items() if node.op == "placeholder"}


def checked_elements(unit: StructuralUnit, elements: Sequence[int]) -> frozenset[int]:
    """Elements of a unit that go, as a set.

    Raises:
        InputError: there is no such element, or none would stay.
    """
    listed = [int(item) for item in elements]
    wrong = [item for item in listed if not 0 <= item < unit.count]
    if wrong:
        raise InputError(f"{unit.name} has {unit.kind} 0 to {unit.count - 1}, and no {wrong[0]}")
    if len(set(listed)) == unit.count:
        raise InputError(f"all {unit.count} {unit.kind} of {unit.name} would be removed; at least one has to stay")
    return frozenset(listed)


def _cuts(chosen: Sequence[tuple[UnitPlan, frozenset[int]]], editor: ProgramEditor) -> Cuts:
    """Node -> axis -> which of its positions stay."""
    cuts: dict[fx.Node, dict[int, Kept]] = {}
    for plan, elements in chosen:
        for original, labels in plan.labels.items() if elements else ():
            (axis,) = dependent_axes(labels)
            kept = ~np.isin(labels.reshape(-1), list(elements))
            if kept.all():
                continue
            own = cuts.setdefault(editor.nodes[original.name], {})
            own[axis] = own[axis] & kept if axis in own else kept
            if not own[axis].any():
                raise InputError(f"nothing of {original.name} would be left; remove fewer {plan.unit.kind} of {plan.unit.name}")
    return cuts


def _cut_stored(editor: ProgramEditor, cuts: Cuts) -> None:
    """Parameters, buffers and constants without what goes; tied ones stay one tensor."""
    targets = {spec.arg.name: str(spec.target) for spec in editor.program.graph_signature.input_specs}
    stored = {**editor.program.constants, **editor.program.state_dict}
    made: dict[tuple[Any, ...], Tensor] = {}
    for node in [item for item in cuts if item.op == "placeholder"]:
        tensor = stored[targets[node.name]]
        key = (
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            *((axis, kept.tobytes()) for axis, kept in cuts[node].items()),
        )
        if tensor.numel() == 0 or tensor.device.type == "meta":
            key = (node.name,)
        if key not in made:
            made[key] = cut_tensor(tensor, cuts[node])
        editor.store(node, targets[node.name], made[key])


def _cut_beside(editor: ProgramEditor, chosen: Sequence[tuple[UnitPlan, frozenset[int]]]) -> None:
    """Operands that other parts read too are cut where these units read them."""
    made: dict[tuple[fx.Node, int, bytes], fx.Node] = {}
    for plan, elements in chosen:
        for (reader, original), labels in plan.beside.items() if elements else ():
            operand = editor.nodes[original.name]
            (axis,) = dependent_axes(labels)
            kept = ~np.isin(labels.reshape(-1), list(elements))
            if kept.all():
                continue
            key = (operand, axis, kept.tobytes())
            if key not in made:
                index = torch.from_numpy(np.flatnonzero(kept))
                (made[key],) = editor.insert(_chosen_along(axis, index), [operand], operand)
            editor.nodes[reader.name].replace_input_with(operand, made[key])
    editor.sort()


def _chosen_along(axis: int, index: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(axis, index)


def _erase_unread(editor: ProgramEditor, cuts: Cuts) -> None:
    """Leave out what reads cut tensors and is read by no output: it was not followed."""
    live = ancestors(editor.output)
    touched = set(cuts)
    for node in editor.graph.nodes:
        if node.op == "call_function" and node not in live and not touched.isdisjoint(node.all_input_nodes):
            touched.add(node)
    for node in reversed(list(editor.graph.nodes)):
        if node in touched and node not in live and node.op == "call_function":
            editor.graph.erase_node(node)


def cut_tensor(tensor: Tensor, kept: Mapping[int, Kept]) -> Tensor:
    """A tensor of its own without some positions; a parameter where it was one."""
    smaller = tensor.detach()
    for axis, positions in kept.items():
        smaller = smaller.index_select(axis, torch.from_numpy(np.flatnonzero(positions)).to(tensor.device))
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def _describe(unit: StructuralUnit, removed: int) -> str:
    return f"{unit.kind} of {unit.name}: {unit.count - removed} of {unit.count} stay"


def _contract(program: ExportedProgram) -> list[tuple[str, ...]]:
    """Sizes of inputs and outputs of the user."""
    users = set(program.graph_signature.user_inputs)
    given = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    (values,) = next(node for node in reversed(program.graph.nodes) if node.op == "output").args
    assert isinstance(values, (list, tuple))  # by the contract of exported programs
    tensors = [node_sizes(node) for node in given] + [
        sizes(item.meta.get("val")) for item in values if isinstance(item, fx.Node)
    ]
    return [tuple(str(size) for size in item) for item in tensors]
