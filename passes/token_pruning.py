"""Token pruning as a graph transform: score, keep a fixed number, and cut the stream and all that runs beside it.

::

    stream --> add --> MLP, next layers ...        ==>      stream --> add --> gather(kept) --> MLP, next layers ...
                                                            q, k --> weights --> score --> top k --> sort --> kept
    mask, cos/sin --> next layers                  ==>      mask, cos/sin --> gather(kept) --> next layers
    ... --> an output, a read-out of all places    ==>      ... --> scatter(kept) --> an output
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.base import PassResult
from mfcompile.passes.program_editor import ProgramEditor
from mfcompile.passes.token_places import sizes
from mfcompile.passes.token_scores import TokenScorer
from mfcompile.passes.token_site_cut import CutOptions, Keep, SiteCut, TokenCut
from mfcompile.passes.token_sites import SitePlan, plan_sites

REST = ("drop", "merge")
RESTORE = ("zeros", "last")


@dataclass(frozen=True)
class PruneTokens:
    """Cut tokens at sites of the exported program of a graph; the program must have fixed token counts there.

    Works on a graph whose ``graph_module`` is that of its exported program: what is cut is what ONNX files are made from.

    Attributes:
        keep: site -> tokens that stay (int, protected ones among them), or the share of those that arrive unprotected (float).
        modalities: placeholder -> modality, for inputs with content.
        image_tokens: node of a mask of image tokens -> how many a sample has at least.
        scorer: gives the scores.
        rest: "drop", or "merge" for one more token that stands for the dropped ones.
        restore: what dropped tokens are where all places are read: "zeros", or "last", their state when they were dropped.
    """

    keep: Mapping[str, Keep]
    modalities: Mapping[str, str]
    image_tokens: Mapping[str, int]
    scorer: TokenScorer
    rest: str = "drop"
    restore: str = "zeros"

    def requires(self, graph: CapturedGraph) -> None:
        """The graph is that of an exported program, and the request can be met."""
        if graph.exported is None or graph.graph_module is not graph.exported.program.graph_module:
            raise PreconditionError(
                "token pruning rewrites exported programs: give the graph of one (see mfcompile.prune_tokens)"
            )
        if self.rest not in REST or self.restore not in RESTORE:
            raise InputError(f"rest={self.rest!r} and restore={self.restore!r}: choose of {REST} and {RESTORE}")

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph with a program that has fewer tokens behind every site; weights are shared."""
        assert graph.exported is not None  # ``requires`` looked
        editor = ProgramEditor(graph.exported.program)
        plans, refused = plan_sites(editor.graph, self.modalities, graph.exported.program.graph_signature.inputs_to_parameters)
        named = {plan.attention.name: plan for plan in plans}
        self._refuse_unknown(named, refused)
        cuts, notes = [], list(refused)
        pending = [named[name] for name in named if name in self.keep]
        for plan in pending:
            if plan.image_mask is not None:
                plan.protected_by_mask = plan.tokens - self.image_tokens[plan.image_mask.name]
        while pending:
            plan = pending.pop(0)
            cut = SiteCut(editor, plan, self.keep[plan.attention.name], CutOptions(self.scorer, self.rest, self.restore))
            cuts.append(cut.run(pending))
            notes += cut.notes()
        program = editor.finish()
        exported = replace(graph.exported, program=program, notes=(*graph.exported.notes, *map(_describe, cuts)))
        return PassResult(replace(graph, graph_module=program.graph_module, exported=exported), bool(cuts), tuple(notes))

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Outputs keep their sizes, and nothing but the batch is free that was not."""
        assert before.exported is not None  # ``requires`` looked
        assert result.graph.exported is not None  # ``apply`` made it
        for old, new in zip(_outputs(before.exported.program), _outputs(result.graph.exported.program), strict=True):
            if [str(size) for size in old] != [str(size) for size in new]:
                raise PostconditionError(f"an output of sizes {tuple(old)} became {tuple(new)} by token pruning")

    def _refuse_unknown(self, named: Mapping[str, SitePlan], refused: list[Diagnostic]) -> None:
        for name in self.keep:
            if name not in named:
                reasons = [str(item) for item in refused if item.subject.startswith(f"{name} at ")]
                raise InputError(
                    f"tokens cannot be cut at {name}: {reasons[0] if reasons else 'there is no attention of that name'}. Sites "
                    f"are {', '.join(named) or 'none'}; find_token_sites lists them with what is refused"
                )


def _describe(cut: TokenCut) -> str:
    merged = " and one for the rest" if cut.merged else ""
    return f"tokens of {cut.site}: {cut.kept}{merged} of {cut.arriving} stay"


def _outputs(program: ExportedProgram) -> list[tuple[Any, ...]]:
    (values,) = next(node for node in reversed(program.graph.nodes) if node.op == "output").args
    assert isinstance(values, (list, tuple))  # by the contract of exported programs
    return [sizes(item.meta.get("val")) for item in values if isinstance(item, fx.Node)]
