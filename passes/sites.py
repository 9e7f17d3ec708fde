"""Prune sites: linear weights by rows that see one input, and why each skipped one is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from torch import fx, nn

from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.operators import CONTRACTIONS, operator_name
from mfcompile.passes.weights import parameter_views
from mfcompile.patterns import WeightNames, select
from mfcompile.region import PruneSite, WeightUse

RegionFor = Callable[[str, Sequence[WeightUse]], str]


def linear_weights(captured: CapturedGraph, used: Iterable[str]) -> tuple[str, ...]:
    """FQNs of all linear weights in ``named_parameters`` order: those that the graph contracts, and unused nn.Linear ones."""
    wanted = set(used)
    owned = {
        id(module.weight)
        for module in captured.module.modules()
        if isinstance(module, nn.Linear) and isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    return tuple(fqn for fqn, parameter in captured.module.named_parameters() if fqn in wanted or id(parameter) in owned)


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
        InputError: a pattern matches no weight.
    """
    targeted = select(targets, names, what="targets") if targets else None
    ignored = select(ignore, names, what="ignore") if ignore else {}
    refused = {item.subject: item.reason for item in refusals}
    other_users = _other_users(captured)
    sites: list[PruneSite] = []
    for fqn in names:
        uses = evidence.get(fqn, ())
        reason = _reason(fqn, uses, other_users, refused, targeted, ignored)
        sites += _rows_as_sites(captured, fqn, uses, region_for, reason)
    listed = {site.fqn for site in sites}
    diagnostics = [Diagnostic(fqn, reason) for fqn, reason in refused.items() if fqn not in listed]
    diagnostics += [
        Diagnostic(site.name, f"called with different modalities; it is pruned with {site.region}")
        for site in sites
        if site.is_shared and site.skipped is None
    ]
    return tuple(sites), tuple(diagnostics)


def _reason(
    fqn: str,
    uses: tuple[WeightUse, ...],
    other_users: Mapping[str, str],
    refused: Mapping[str, str],
    targeted: Mapping[str, str] | None,
    ignored: Mapping[str, str],
) -> str | None:
    """Why a weight stays dense; None when it is pruned."""
    if fqn in refused:
        return refused[fqn]
    if not uses:
        return "no call of the captured run uses it"
    if fqn in other_users:
        return other_users[fqn]
    if fqn in ignored:
        return f"ignored by the pattern {ignored[fqn]!r}"
    if targeted is not None:
        return None if fqn in targeted else "no pattern of targets matches it"
    if all(use.block is None for use in uses):
        return "outside any repeated block (a head or a projector)"
    return None


def _other_users(captured: CapturedGraph) -> dict[str, str]:
    """FQN -> why its values are read by something else than a linear node (an embedding look-up, an elementwise operator)."""
    views = parameter_views(captured)
    found: dict[str, str] = {}
    for node, (fqn, _) in views.items():
        for user in node.users:
            if user in views or operator_name(user) in CONTRACTIONS or user.op == "output":
                continue
            if len(captured.parameter(fqn).shape) != 2 or _is_split(user, node):
                continue
            name = operator_name(user)
            tied = "it is tied to an embedding table" if name.startswith("embedding") else f"{name} reads it as well"
            found[fqn] = f"{tied} ({user.name}); masking it would change more than a linear layer"
    return found


def _is_split(user: fx.Node, node: fx.Node) -> bool:
    return operator_name(user) in {"split", "chunk", "unbind", "split_with_sizes", "tensor_split"} and user.args[0] is node


def _rows_as_sites(
    captured: CapturedGraph,
    fqn: str,
    uses: tuple[WeightUse, ...],
    region_for: RegionFor,
    reason: str | None,
) -> list[PruneSite]:
    """Cut the output rows where the set of uses changes, so that all rows of a site see the same activations."""
    shape = tuple(captured.parameter(fqn).shape)
    is_transposed = bool(uses) and uses[0].is_transposed
    out_features, in_features = (shape[1], shape[0]) if is_transposed else (shape[0], shape[1])
    if any(use.is_transposed != is_transposed for use in uses):
        reason = "it is used both ways round (as W and as its transpose)"
        uses = ()
    cuts = sorted({0, out_features, *(edge for use in uses for edge in use.rows)})
    tied = tuple(name for name in captured.aliases.get(fqn, ()) if name != fqn)
    sites = []
    for start, stop in pairwise(cuts):
        covering = [use for use in uses if use.rows[0] <= start and stop <= use.rows[1]]
        labels = {use.label for use in covering}
        sites.append(
            PruneSite(
                name=fqn if (start, stop) == (0, out_features) else f"{fqn}[{start}:{stop}]",
                fqn=fqn,
                rows=(start, stop),
                out_features=stop - start,
                in_features=in_features,
                is_transposed=is_transposed,
                region=region_for(fqn, covering or uses),
                tied_with=tied,
                is_shared=len(labels) > 1,
                skipped=reason if reason or covering else "no call of the captured run uses these rows",
            )
        )
    return sites
