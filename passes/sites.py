"""Prune sites: linear weights by expert and by rows that see one input, and why each skipped one is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import fx, nn

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.operators import CONTRACTIONS, CONVOLUTIONS, SOFTMAX_ATTENTION, operator_name
from mfcompile.passes.weights import parameter_views
from mfcompile.patterns import WeightNames, matches, select
from mfcompile.region import ROWS, PruneSite, WeightLayout, WeightUse

_MULTIPLYING = CONTRACTIONS | CONVOLUTIONS | SOFTMAX_ATTENTION

RegionFor = Callable[[str, Sequence[WeightUse]], str]


def linear_weights(captured: CapturedGraph, used: Iterable[str]) -> tuple[str, ...]:
    """FQNs of all weights of layers in ``named_parameters`` order: those of ``used``, and unused ones like them."""
    wanted = set(used)
    owned = {
        id(module.weight)
        for module in captured.module.modules()
        if isinstance(module, nn.Linear) and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    # Parameters in the place of used weights in modules of their class: experts that were not called, say.
    parameters = {fqn for fqn, _ in captured.module.named_parameters()}
    places = {_place_of(captured, fqn) for fqn in wanted & parameters}  # a buffer may be multiplied like a weight
    read = set(captured.parameter_nodes.values())
    return tuple(
        fqn
        for fqn, parameter in captured.module.named_parameters()
        if fqn in wanted or id(parameter) in owned or (fqn not in read and _place_of(captured, fqn) in places)
    )


def _place_of(captured: CapturedGraph, fqn: str) -> tuple[type, int]:
    """Class of the module that owns a parameter, and the parameter's number in it."""
    path, _, leaf = fqn.rpartition(".")
    owner = captured.module.get_submodule(path)
    return type(owner), [name for name, _ in owner._parameters.items()].index(leaf)  # a scripted one cannot be iterated


def build_sites(
    captured: CapturedGraph,
    evidence: Mapping[str, tuple[WeightUse, ...]],
    region_for: RegionFor,
    refusals: Iterable[Diagnostic],
    names: Mapping[str, WeightNames],
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
) -> tuple[tuple[PruneSite, ...], tuple[Diagnostic, ...]]:
    """Every linear weight as sites; a site that is not pruned carries the reason.

    Args:
        captured: the graph.
        evidence: FQN -> its uses.
        region_for: names the region of a weight from those of its uses that matter.
        refusals: contractions with parameters that are no rows of a linear weight.
        names: FQN -> what patterns match, for every linear weight.
        targets, ignore: the user's patterns.

    Raises:
        InputError: a pattern matches no weight, or only weights that cannot be pruned.
    """
    targeted = _targeted(targets, names) if targets else None
    ignored = select(ignore, names, what="ignore") if ignore else {}
    refused = {item.subject: item.reason for item in refusals}
    disagreements = _disagreements(evidence)
    refused = {**disagreements, **refused}
    other_users = {**_other_users(captured), **_in_compiled_code(captured, names)}
    hopeless = {
        fqn: reason for fqn in names if (reason := _cannot(fqn, evidence.get(fqn, ()), other_users, refused)) is not None
    }
    _check_targets(targets, names, refused)
    # Code without any layer that structure shows (weights in dictionaries, loops over names): all but its heads.
    is_flat = targeted is None and not any(use.block for uses in evidence.values() for use in uses)
    inner = _inner_weights(captured, evidence) if is_flat else frozenset()
    sites: list[PruneSite] = []
    for fqn in names:
        uses = evidence.get(fqn, ())
        reason = hopeless.get(fqn) or _reason(fqn, uses, targeted, ignored, inner)
        sites += _matrices_as_sites(captured, fqn, () if fqn in disagreements else uses, region_for, reason)
    listed = {site.fqn for site in sites}
    diagnostics = [Diagnostic(fqn, reason) for fqn, reason in refused.items() if fqn not in listed]
    reason = "a buffer, no parameter: it stays as it is"
    diagnostics += [Diagnostic(fqn, reason) for fqn in evidence if fqn not in listed]
    if inner and any(site.skipped is None for site in sites):
        reason = "no layers were found in it, so every linear weight but those that compute an output is pruned; see ignore"
        diagnostics.append(Diagnostic("the model", reason))
    diagnostics += [
        Diagnostic(
            site.name if site.expert is None else site.fqn, f"called with different modalities; it is pruned with {site.region}"
        )
        for site in sites
        if site.is_shared and site.skipped is None
    ]
    return tuple(sites), tuple(dict.fromkeys(diagnostics))


def _targeted(targets: Sequence[str], names: Mapping[str, WeightNames]) -> dict[str, str]:
    """FQN -> the pattern that targets it; one that names the weight before one that names its region."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    by_name = [pattern for pattern in patterns if not pattern.startswith("region:")]
    return select(patterns, names, what="targets") | (select(by_name, names, what="targets") if by_name else {})


def _disagreements(evidence: Mapping[str, tuple[WeightUse, ...]]) -> dict[str, str]:
    """FQN -> that its uses read its dimensions differently."""
    found: dict[str, str] = {}
    for fqn, uses in evidence.items():
        layouts = {use.layout for use in uses}
        if len(layouts) > 1:
            is_square = all(len(layout.inputs) == len(layout.outputs) == 1 and not layout.experts for layout in layouts)
            found[fqn] = (
                "it is used both ways round (as W and as its transpose)"
                if is_square
                else "its uses disagree about which of its dimensions are inputs, outputs and experts"
            )
    return found


def _cannot(fqn: str, uses: tuple[WeightUse, ...], other_users: Mapping[str, str], refused: Mapping[str, str]) -> str | None:
    """Why a weight cannot be pruned, whatever the user asks for."""
    if fqn in refused:
        return refused[fqn]
    return other_users.get(fqn) if uses else "no call of the captured run uses it"


def _check_targets(targets: Sequence[str] | None, names: Mapping[str, WeightNames], refused: Mapping[str, str]) -> None:
    """Refuse a pattern that names nothing but weights that are no linear ones."""
    for pattern in [targets] if isinstance(targets, str) else targets or ():
        hits = [fqn for fqn, known in names.items() if matches(pattern, known)]
        if hits and refused.keys() >= set(hits):
            more = f" (and {len(hits) - 1} more)" if len(hits) > 1 else ""
            raise InputError(
                f"targets: the pattern {pattern!r} names only weights that cannot be pruned: {hits[0]}{more} is left dense, "
                f"because: {refused[hits[0]]}. Leave the pattern out"
            )


def _inner_weights(captured: CapturedGraph, evidence: Mapping[str, tuple[WeightUse, ...]]) -> frozenset[str]:
    """FQNs of weights whose results are multiplied again before they leave the model."""
    multiplied: set[fx.Node] = set()
    for node in reversed(list(captured.graph.nodes)):
        if any(user in multiplied or operator_name(user) in _MULTIPLYING for user in node.users):
            multiplied.add(node)
    names = {node.name for node in multiplied}
    return frozenset(fqn for fqn, uses in evidence.items() if any(use.node in names for use in uses))


def _reason(
    fqn: str,
    uses: tuple[WeightUse, ...],
    targeted: Mapping[str, str] | None,
    ignored: Mapping[str, str],
    inner: frozenset[str],
) -> str | None:
    """Why a weight that could be pruned stays dense; None when it is pruned."""
    if fqn in ignored:
        return f"ignored by the pattern {ignored[fqn]!r}"
    is_convolution = all(use.reading.patches is not None for use in uses)
    if is_convolution and (targeted is None or targeted.get(fqn, "region:").startswith("region:")):
        return "a convolution of patches or single places (pruned only where targets names it)"
    if targeted is not None:
        return None if fqn in targeted else "no pattern of targets matches it"
    if fqn not in inner and all(use.block is None for use in uses):
        return "outside any repeated block (a head or a projector)"
    return None


def _in_compiled_code(captured: CapturedGraph, names: Iterable[str]) -> dict[str, str]:
    """FQN -> why no mask can be put on it, for weights of TorchScript modules, whose code cannot be parametrized."""
    paths = {path for path, item in captured.module.named_modules() if isinstance(item, torch.jit.ScriptModule)}
    found: dict[str, str] = {}
    for fqn in names:
        parts = fqn.split(".")
        inside = [path for end in range(1, len(parts)) if (path := ".".join(parts[:end])) in paths]
        if inside:
            found[fqn] = f"it belongs to the TorchScript module {inside[0]}; put the Python module in its place to prune it"
    return found


def _other_users(captured: CapturedGraph) -> dict[str, str]:
    """FQN -> why its values are read by something else than a linear node (an embedding look-up, an elementwise operator)."""
    views = parameter_views(captured)
    found: dict[str, str] = {}
    for node, view in views.items():
        for user in node.users:
            if user in views or operator_name(user) in CONTRACTIONS | CONVOLUTIONS or user.op == "output":
                continue
            if captured.parameter(view.fqn).ndim < 2 or _is_split(user, node):
                continue
            name = operator_name(user)
            tied = "it is tied to an embedding table" if name.startswith("embedding") else f"{name} reads it as well"
            found[view.fqn] = f"{tied} ({user.name}); masking it would change more than a linear layer"
    return found


def _is_split(user: fx.Node, node: fx.Node) -> bool:
    return operator_name(user) in {"split", "chunk", "unbind", "split_with_sizes", "tensor_split"} and user.args[0] is node


def _matrices_as_sites(
    captured: CapturedGraph,
    fqn: str,
    uses: tuple[WeightUse, ...],
    region_for: RegionFor,
    reason: str | None,
) -> list[PruneSite]:
    """The sites of one parameter, expert by expert.

    An expert that no token of the example was routed to is like the others: its own tokens may come with calibration.
    """
    shape = tuple(captured.parameter(fqn).shape)
    layout = uses[0].layout if uses else _guessed_layout(len(shape))
    if not layout.experts:
        return _rows_as_sites(captured, fqn, layout, uses, region_for, reason, None)
    by_expert: dict[int, tuple[WeightUse, ...]] = {}
    for use in uses:
        for expert in range(*use.experts):
            by_expert[expert] = (*by_expert.get(expert, ()), use)
    sites: list[PruneSite] = []
    for expert in range(layout.sizes(shape)[0]):
        sites += _rows_as_sites(captured, fqn, layout, by_expert.get(expert, uses), region_for, reason, expert)
    return sites


def _guessed_layout(ndim: int) -> WeightLayout:
    """How a weight that is not used is shown: outputs first."""
    return ROWS if ndim == 2 else WeightLayout((0,), tuple(range(1, ndim)))


def _rows_as_sites(
    captured: CapturedGraph,
    fqn: str,
    layout: WeightLayout,
    uses: tuple[WeightUse, ...],
    region_for: RegionFor,
    reason: str | None,
    expert: int | None,
) -> list[PruneSite]:
    """Cut the output rows where the set of uses changes, so that all rows of a site see the same activations."""
    _, out_features, in_features = layout.sizes(tuple(captured.parameter(fqn).shape))
    cuts = sorted({0, out_features, *(edge for use in uses for edge in use.rows)})
    tied = tuple(name for name in captured.aliases.get(fqn, ()) if name != fqn)
    matrix = fqn if expert is None else f"{fqn}[{expert}]"
    sites = []
    for start, stop in pairwise(cuts):
        covering = [use for use in uses if use.rows[0] <= start and stop <= use.rows[1]]
        labels = {use.label for use in covering}
        sites.append(
            PruneSite(
                name=matrix if (start, stop) == (0, out_features) else f"{matrix}[{start}:{stop}]",
                fqn=fqn,
                rows=(start, stop),
                out_features=stop - start,
                in_features=in_features,
                layout=layout,
                region=region_for(fqn, covering or uses),
                tied_with=tied,
                is_shared=len(labels) > 1,
                skipped=reason if reason or covering else "no call of the captured run uses these rows",
                expert=expert,
            )
        )
    return sites
