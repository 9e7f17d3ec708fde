"""Regions and sites: which modality every linear weight serves, and which weights are pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.passes.attention import attention_label, downstream_label
from mfcompile.passes.blocks import BlockFinder, CallStacks, leaving_labels
from mfcompile.passes.chains import chained_items
from mfcompile.passes.labels import LabelFlow, flow_labels
from mfcompile.passes.modalities import infer_modalities
from mfcompile.passes.sites import build_sites, linear_weights
from mfcompile.passes.weights import find_weight_uses
from mfcompile.patterns import WeightNames, select, weight_names
from mfcompile.region import FUSION, NO_LABELS, UNTAGGED, Labels, RegionMap, WeightUse


@dataclass(frozen=True)
class RegionOptions:
    """What a user may set about regions and sites.

    Attributes:
        modalities: input name -> modality, or "control".
        regions: pattern -> region, for the weights that it matches.
        targets: patterns of the weights to prune; None prunes the linear weights inside repeated blocks.
        ignore: patterns of weights that stay dense.
        cross_attention_kv: "block" groups image-fed keys and values with the block that they feed, "input" with the
            modality that they read (the literal reading of Eq. 7).
    """

    modalities: Mapping[str, str] | None = None
    regions: Mapping[str, str] | None = None
    targets: Sequence[str] | None = None
    ignore: Sequence[str] | None = None
    cross_attention_kv: str = "block"


def infer_regions(captured: CapturedGraph, options: RegionOptions | None = None) -> RegionMap:
    """Tag every linear weight with the modality it serves, by dataflow from the inputs, and decide what is pruned.

    Args:
        captured: a graph whose nodes know their submodule calls.
        options: overrides; None for the defaults.

    Returns:
        Regions, evidence and sites.

    Raises:
        RegionError: an input has no known modality.
        InputError: a pattern matches nothing.
    """
    options = options or RegionOptions()
    for pattern, region in (options.regions or {}).items():
        if not isinstance(region, str) or not region:
            raise InputError(f"regions[{pattern!r}] is {region!r}: the name of a region is a string, such as 'vision'")
    modalities = infer_modalities(captured, options.modalities)
    flow = flow_labels(captured, {item.name: frozenset({item.modality}) for item in modalities if item.modality})
    findings = find_weight_uses(captured)
    uses = _with_labels(captured, findings.uses, flow)
    content = {item.modality for item in modalities if item.modality}
    evidence: dict[str, tuple[WeightUse, ...]] = {}
    for use in uses:
        evidence[use.fqn] = (*evidence.get(use.fqn, ()), use)
    decided, diagnostics = _decide(captured, uses, flow.computed, options)
    overrides: dict[str, str] = {}

    def region_for(fqn: str, found: Sequence[WeightUse]) -> str:
        if fqn in overrides:
            return overrides[fqn]
        labels = NO_LABELS.union(*(decided[use] for use in found))
        place = findings.layers.get(fqn) or findings.readers.get(fqn)
        if not found and place is not None:  # it is not pruned, but its region is known
            labels = flow.computed[place]
        return name_region(labels, content)

    weights = {fqn: region_for(fqn, found) for fqn, found in evidence.items()}
    chosen: dict[str, str] = {}
    if options.regions:
        chosen = select(list(options.regions), _names(captured, weights, findings.layers), what="regions")
        overrides.update({fqn: options.regions[pattern] for fqn, pattern in chosen.items()})
    weights = {fqn: region_for(fqn, found) for fqn, found in evidence.items()}
    names = _names(captured, weights, findings.layers)
    sites, site_diagnostics = build_sites(
        captured, evidence, region_for, findings.refusals, names, options.targets, options.ignore
    )
    weights = {fqn: region_for(fqn, evidence.get(fqn, ())) for fqn in names}
    return RegionMap(modalities, weights, evidence, sites, chosen, (*diagnostics, *site_diagnostics))


def name_region(labels: Labels, content: Iterable[str | None]) -> str:
    """Name of the region of a set of modalities.

    One modality is its own region. Several are "fusion" when they are all that the model has, or the only mixture of
    two; in a model of three and more modalities a partial mixture is named by its parts ("audio+text").
    """
    if not labels:
        return UNTAGGED
    if len(labels) == 1:
        return next(iter(labels))
    return FUSION if labels >= {item for item in content if item} else "+".join(sorted(labels))


def _with_labels(captured: CapturedGraph, uses: tuple[WeightUse, ...], flow: LabelFlow) -> tuple[WeightUse, ...]:
    nodes = {node.name: node for node in captured.graph.nodes}
    stacks = CallStacks(captured)
    # A convolution makes no block: what is repeated is told by the linear weights.
    finder = BlockFinder(captured, tuple(use for use in uses if use.reading.patches is None), stacks, flow)
    leaving = leaving_labels(captured, flow, stacks)
    blocks = {use: finder.block_of(stacks.around(nodes[use.node])) for use in uses}
    items = chained_items(captured, [use for use, block in blocks.items() if block is None and use.reading.patches is None])
    found = []
    for use, block in blocks.items():
        node = nodes[use.node]
        path, block_label = (block.path, leaving.get(block, NO_LABELS)) if block else (items.get(use), NO_LABELS)
        if use in items:  # it may be called, or be no module at all
            calls = [call for call in stacks.around(node) if call.path == path]
            block_label = leaving.get(calls[-1], NO_LABELS) if calls else flow.computed[node]
        label = flow.at(nodes[use.activation], node)
        found.append(replace(use, label=label, block=path, block_label=block_label))
    return tuple(found)


def _decide(
    captured: CapturedGraph,
    uses: Iterable[WeightUse],
    labels: Mapping[fx.Node, Labels],
    options: RegionOptions,
) -> tuple[dict[WeightUse, Labels], list[Diagnostic]]:
    """The region of every use: its block's, else its attention's, else its input's, else what lies downstream."""
    nodes = {node.name: node for node in captured.graph.nodes}
    decided: dict[WeightUse, Labels] = {}
    diagnostics: list[Diagnostic] = []
    for use in uses:
        node = nodes[use.node]
        if options.cross_attention_kv == "input" and use.label:
            decided[use] = use.label
        elif use.block_label:
            decided[use] = use.block_label
        else:
            decided[use] = attention_label(node, labels) or use.label
        if not decided[use]:
            decided[use] = downstream_label(node, labels)
            reason = "no input reaches it; it takes the region of the nearest labelled value downstream"
            if not decided[use]:
                reason = "no input reaches it and it reaches no labelled value: it is untagged"
            diagnostics.append(Diagnostic(use.fqn, reason))
    return decided, diagnostics


def _names(captured: CapturedGraph, weights: Mapping[str, str], refused: Iterable[str]) -> dict[str, WeightNames]:
    """What patterns can match, for every weight of a layer: used as a linear one, refused, or not used at all."""
    return {
        fqn: weight_names(captured.module, fqn, captured.aliases.get(fqn, ()), weights.get(fqn, UNTAGGED))
        for fqn in linear_weights(captured, (*weights, *refused))
    }
