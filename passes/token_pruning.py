"""Token pruning as a graph transform: score, keep a fixed number, and cut the stream and all that runs beside it.

::

    stream --> add --> MLP, next layers ...        ==>      stream --> add --> gather(kept) --> MLP, next layers ...
                                                            q, k --> weights --> score --> top k --> sort --> kept
    mask, cos/sin --> next layers                  ==>      mask, cos/sin --> gather(kept) --> next layers
    ... --> an output, a read-out of all places    ==>      ... --> scatter(kept) --> an output
                                                            or, for an output: as short as it is, and its positions
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from mfcompile.errors import InputError, PostconditionError, PreconditionError
from mfcompile.graph import CapturedGraph, Diagnostic, ExportedModel
from mfcompile.masks import MaskSet
from mfcompile.passes.base import PassResult
from mfcompile.passes.live_heads import heads_of_program
from mfcompile.passes.program_editor import ProgramEditor
from mfcompile.passes.token_places import sizes
from mfcompile.passes.token_scores import SCORERS, TokenScorer
from mfcompile.passes.token_site_cut import CutOptions, Keep, SiteCut, TokenCut
from mfcompile.passes.token_sites import SitePlan, plan_sites

REST = ("drop", "merge")
RESTORE = ("zeros", "last")
OUTPUTS = ("restore", "shorter")

KEPT_KEY = "mfcompile.kept"
"""Metadata of a program with shorter outputs: JSON of name of an output of positions -> the output whose tokens these are."""

TOKENS_KEY = "mfcompile.tokens"
"""Metadata of a program with fewer tokens: JSON list of what was asked for, and done, by each cut after the other."""

SUFFIX = "_kept"
"""What the name of an output of positions has behind the name of the output that it belongs to."""


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
        outputs: "restore", or "shorter": an output that lists tokens lists those that are left, and a further output gives
            their positions, (batch, tokens left) int64, -1 for a merged one. The outputs are then one dict of tensors.
        masks: what masks remove of the weights since; heads that they remove do not count in scores.
        head_factors: site -> (heads,) factors between 0 and 1 of its heads in scores, in place of what the weights say.
        sites: what ``plan_sites`` gave for the program, where that is known.
    """

    keep: Mapping[str, Keep]
    modalities: Mapping[str, str]
    image_tokens: Mapping[str, int]
    scorer: TokenScorer
    rest: str = "drop"
    restore: str = "zeros"
    outputs: str = "restore"
    masks: MaskSet | None = None
    head_factors: Mapping[str, Tensor] = field(default_factory=dict)
    sites: tuple[Sequence[SitePlan], Sequence[Diagnostic]] | None = None

    def requires(self, graph: CapturedGraph) -> None:
        """The graph is that of an exported program, and the request can be met."""
        if graph.exported is None or graph.graph_module is not graph.exported.program.graph_module:
            raise PreconditionError(
                "token pruning rewrites exported programs: give the graph of one (see mfcompile.prune_tokens)"
            )
        for name, value, known in (
            ("rest", self.rest, REST), ("restore", self.restore, RESTORE), ("outputs", self.outputs, OUTPUTS)
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; choose one of {', '.join(known)}")

    def apply(self, graph: CapturedGraph) -> PassResult:
        """A graph with a program that has fewer tokens behind every site; weights are shared."""
        assert graph.exported is not None  # ``requires`` looked
        editor = ProgramEditor(graph.exported.program)
        names = _output_places(graph.exported)
        listed = _listed_before(graph.exported, names, editor.output)
        plans, refused = self._sites_of(graph.exported.program)
        plans = [plan.in_copy(editor.nodes) for plan in plans]
        named = {plan.attention.name: plan for plan in plans}
        self._refuse_unknown(named, refused)
        cuts, notes = [], list[Diagnostic]()
        options = CutOptions(self.scorer, self.rest, self.restore, self.outputs)
        pending = [named[name] for name in named if name in self.keep]
        for plan in pending:
            if plan.image_mask is not None:
                plan.protected_by_mask = plan.tokens - self.image_tokens[plan.image_mask.name]
            factors = self.head_factors.get(plan.attention.name)
            program = graph.exported.program
            plan.live_heads = heads_of_program(plan.attention, plan.point, plan.batch, program, self.masks, factors)
        while pending:
            plan = pending.pop(0)
            keep = self.keep[plan.attention.name]
            if plan.tokens == 1 and (isinstance(keep, float) or keep == 1):
                notes.append(Diagnostic(plan.attention.name, "sites before it leave one token, which stays"))
                continue
            cut = SiteCut(editor, plan, keep, options, listed)
            cuts.append(cut.run(pending))
            notes += cut.notes()
        exported = _finished(editor, graph.exported, names, listed)
        told = json.dumps([*token_requests(exported.metadata), self._told(cuts)])
        metadata = {**exported.metadata, TOKENS_KEY: told}
        exported = replace(exported, notes=(*exported.notes, *map(_describe, cuts)), metadata=metadata)
        program = exported.program
        return PassResult(replace(graph, graph_module=program.graph_module, exported=exported), bool(cuts), tuple(notes))

    def _sites_of(self, program: ExportedProgram) -> tuple[Sequence[SitePlan], Sequence[Diagnostic]]:
        return self.sites or plan_sites(program.graph, self.modalities, program.graph_signature.inputs_to_parameters)

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Outputs keep their names and sizes; those that come with their positions may be shorter along axes."""
        assert before.exported is not None  # ``requires`` looked
        assert result.graph.exported is not None  # ``apply`` made it
        old, new = _output_sizes(before.exported), _output_sizes(result.graph.exported)
        listed = _kept_outputs(result.graph.exported)
        shorter = {*listed, *listed.values()}
        for name, wanted in old.items():
            found = new.get(name)
            if found == wanted:
                continue
            if found is None or name not in shorter or len(found) != len(wanted) or any(map(_is_longer, found, wanted)):
                raise PostconditionError(f"the output {name} of sizes {wanted} became {found} by token pruning")

    def _told(self, cuts: list[TokenCut]) -> dict[str, Any]:
        """The request and what came of it, as JSON knows it."""
        scorer = next((name for name, known in SCORERS.items() if known == self.scorer), None)
        done = [
            {
                "site": cut.site,
                "arriving": cut.arriving,
                "kept": cut.kept,
                "protected": cut.protected,
                "merged": cut.merged,
                "restored": list(cut.restored),
            }
            for cut in cuts
        ]
        asked = {"keep": dict(self.keep), "scorer": scorer, "rest": self.rest, "restore": self.restore}
        return {**asked, "outputs": self.outputs, "cuts": done}

    def _refuse_unknown(self, named: Mapping[str, SitePlan], refused: Sequence[Diagnostic]) -> None:
        for name in self.keep:
            if name not in named:
                reasons = [str(item) for item in refused if item.subject.startswith(f"{name} at ")]
                raise InputError(
                    f"tokens cannot be cut at {name}: {reasons[0] if reasons else 'there is no attention of that name'}. Sites "
                    f"are {', '.join(named) or 'none'}; find_token_sites lists them with what is refused"
                )


def token_requests(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was asked for and done to a program, or to the file made from it, by its metadata.

    Returns:
        Of each request "keep" (site -> number or share), "scorer" (None for one of the user), "rest", "restore", "outputs"
        and "cuts" (of each site "site", "arriving", "kept", "protected", "merged", and "restored": what has all places again).
    """
    found: list[dict[str, Any]] = json.loads(metadata.get(TOKENS_KEY, "[]"))
    return found


def _describe(cut: TokenCut) -> str:
    merged = " and one for the rest" if cut.merged else ""
    return f"tokens of {cut.site}: {cut.kept}{merged} of {cut.arriving} stay"


def _output_places(exported: ExportedModel) -> dict[str, int]:
    """Name of every tensor that the model gives -> its place among all that the program gives, in order."""
    program = exported.program
    (values,) = next(node for node in reversed(program.graph.nodes) if node.op == "output").args
    assert isinstance(values, (list, tuple))  # by the contract of exported programs
    users = [
        place
        for place, (spec, value) in enumerate(zip(program.graph_signature.output_specs, values, strict=True))
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(value, fx.Node)
    ]
    return dict(zip(exported.output_names, users, strict=True))


def _kept_outputs(exported: ExportedModel) -> dict[str, str]:
    """Name of an output of positions -> the output whose tokens these are."""
    found: dict[str, str] = json.loads(exported.metadata.get(KEPT_KEY, "{}"))
    return found


def _listed_before(exported: ExportedModel, names: Mapping[str, int], output: fx.Node) -> dict[int, fx.Node]:
    """Place of an output that an earlier cut made shorter -> its positions."""
    values: Any = output.args[0]
    return {names[name]: values[names[kept]] for kept, name in _kept_outputs(exported).items()}


def _finished(
    editor: ProgramEditor, exported: ExportedModel, names: Mapping[str, int], listed: Mapping[int, fx.Node]
) -> ExportedModel:
    """The model of the changed program, with an output of positions for every output that is shorter."""
    if not listed:
        return replace(exported, program=editor.finish())
    values: Any = editor.output.args[0]
    known = {shortened: kept for kept, shortened in _kept_outputs(exported).items()}
    places = {place: name for name, place in names.items()}
    kept = {place: known.get(places[place]) or _free_name(places[place], names) for place in sorted(listed)}
    named = {name: values[place] for name, place in names.items()}
    named |= {name: listed[place] for place, name in kept.items()}
    told = json.dumps({name: places[place] for place, name in kept.items()})
    program = editor.finish(named)
    return replace(exported, program=program, output_names=tuple(named), metadata={**exported.metadata, KEPT_KEY: told})


def _free_name(name: str, taken: Mapping[str, int]) -> str:
    found = name + SUFFIX
    while found in taken:
        found += "_"
    return found


def _output_sizes(exported: ExportedModel) -> dict[str, list[str]]:
    (values,) = next(node for node in reversed(exported.program.graph.nodes) if node.op == "output").args
    assert isinstance(values, (list, tuple))  # by the contract of exported programs
    nodes: dict[str, Any] = {name: values[place] for name, place in _output_places(exported).items()}
    return {name: [str(size) for size in sizes(node.meta.get("val"))] for name, node in nodes.items()}


def _is_longer(found: str, wanted: str) -> bool:
    return found != wanted and not (found.isdigit() and wanted.isdigit() and int(found) < int(wanted))
