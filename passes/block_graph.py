"""The quotient graph of a model: inputs, stacks of blocks and heads, joined by what flows between them.

Nodes of the captured graph that belong to no block are contracted, and the blocks of one container that serve one region
are taken together, so that a model of sixty layers gives the same few nodes as one of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch import fx

from mfcompile.graph import CapturedGraph
from mfcompile.passes.blocks import CallStacks
from mfcompile.region import RegionMap, WeightUse

INPUT, STACK, HEAD, OUTPUT = "input", "stack", "head", "output"


def block_graph(captured: CapturedGraph, regions: RegionMap) -> nx.DiGraph:
    """The quotient graph of a tagged model.

    Args:
        captured: the captured model.
        regions: its regions.

    Returns:
        A directed graph. Every node has ``kind`` ("input", "stack", "head", "output"), ``region`` (the modality of an input,
        "" of an output), ``blocks`` (how many blocks it stands for), ``layers`` and ``weights`` (how many linear weights it
        holds, and their elements) and ``pruned`` (those of the elements that are pruned by default or as asked). Control
        inputs are left out. An edge means that a value of the one reaches the other past no third node.
    """
    groups = _groups(regions)
    quotient = nx.DiGraph()
    for item in regions.modalities:
        if item.modality is not None:
            quotient.add_node(item.name, kind=INPUT, region=item.modality, blocks=0, layers=0, weights=0, pruned=0)
    for name, (kind, region, blocks, fqns) in groups.items():
        sites = [site for site in regions.sites if site.fqn in fqns]
        quotient.add_node(
            name,
            kind=kind,
            region=region,
            blocks=len(blocks),
            layers=len(fqns),
            weights=sum(site.weight_count for site in sites),
            pruned=sum(site.weight_count for site in sites if site.skipped is None),
        )
    _add_flow(captured, regions, quotient)
    return quotient


def _groups(regions: RegionMap) -> dict[str, tuple[str, str, set[str], set[str]]]:
    """Name of a group -> (kind, region, its blocks, its weights)."""
    found: dict[str, tuple[str, str, set[str], set[str]]] = {}
    for fqn, uses in _linear(regions).items():
        for use in uses:
            region = regions.weights[fqn]
            kind = HEAD if use.block is None else STACK
            group = found.setdefault(_group_of(use.block, use.stack, region), (kind, region, set(), set()))
            group[2].add(use.block or "")
            group[3].add(fqn)
    return found


def _linear(regions: RegionMap) -> dict[str, tuple[WeightUse, ...]]:
    """FQN -> its uses, without convolutions: what they join is left to the nodes between the groups."""
    return {fqn: uses for fqn, uses in regions.evidence.items() if all(use.reading.patches is None for use in uses)}


def _group_of(block: str | None, stack: tuple[str, ...], region: str) -> str:
    """Name of the group that a use belongs to: the container of its block and its region, or the module of a head."""
    if block is None:
        return stack[-1] if stack and stack[-1] else "the model itself"
    return f"{block.rpartition('.')[0] or block} ({region})"


def _add_flow(captured: CapturedGraph, regions: RegionMap, quotient: nx.DiGraph) -> None:
    """Edges between groups, through the nodes that belong to none."""
    owner = _owners(captured, regions)
    inputs = {spec.node: spec.name for spec in captured.inputs if spec.name in quotient}
    arriving: dict[fx.Node, frozenset[str]] = {}
    for node in captured.graph.nodes:
        incoming = frozenset().union(*(arriving[source] for source in node.all_input_nodes))
        name = inputs.get(node.name) if node.op == "placeholder" else owner.get(node)
        if node.op == "output":
            for position, output in enumerate(captured.output_names):
                quotient.add_node(output, kind=OUTPUT, region="", blocks=0, layers=0, weights=0, pruned=0)
                value = _output_node(node, position)
                quotient.add_edges_from((source, output) for source in (arriving[value] if value is not None else ()))
            continue
        if name is not None:
            quotient.add_edges_from((source, name) for source in incoming if source != name)
        arriving[node] = frozenset({name}) if name is not None else incoming


def _output_node(output: fx.Node, position: int) -> fx.Node | None:
    values = output.args[0]
    value = values[position] if isinstance(values, (list, tuple)) else None
    return value if isinstance(value, fx.Node) else None


def _owners(captured: CapturedGraph, regions: RegionMap) -> Mapping[fx.Node, str]:
    """Node -> its group: everything that runs inside a block, and the linear nodes of heads."""
    stacks = CallStacks(captured)
    by_block: dict[str, str] = {}
    by_node: dict[str, str] = {}
    for uses in _linear(regions).values():
        for use in uses:
            name = _group_of(use.block, use.stack, regions.weights[use.fqn])
            if use.block is None:
                by_node[use.node] = name
            else:
                by_block.setdefault(use.block, name)
    found: dict[fx.Node, str] = {}
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        blocks = [by_block[call.path] for call in stacks.around(node) if call.path in by_block]
        if blocks:
            found[node] = blocks[-1]
        elif node.name in by_node:
            found[node] = by_node[node.name]
    return found
