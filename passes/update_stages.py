"""Stages of a layer-wise weight update: which sites are rewritten together, from one run over the calibration batches.

A layer should be rewritten for the inputs that it gets from a model whose earlier layers are pruned already. Earlier is a
matter of dataflow, not of names: the depth of a site is the number of pruned layers on the longest way to it, so that
layers of towers that do not see each other share a stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from torch import fx

from mfcompile.graph import CapturedGraph
from mfcompile.passes.operators import is_view, written_arguments
from mfcompile.region import PruneSite, RegionMap, WeightUse

_GRAM_BYTES = 4
"""Bytes per element of a Gram matrix."""


@dataclass(frozen=True)
class SiteGroup:
    """Sites that see the same activations, and so share one Gram matrix.

    Attributes:
        sites: in ``named_parameters`` order.
        activations: distinct activations that they see in one forward pass.
        depth: pruned layers on the longest way to the first of them.
        place: of the first of them in the order of execution.
    """

    sites: tuple[PruneSite, ...]
    activations: int
    depth: int
    place: int

    @property
    def size_bytes(self) -> int:
        """Memory while it is collected: the sum, and what one forward pass adds to it."""
        return _GRAM_BYTES * self.sites[0].in_features ** 2 * (1 + self.activations)


def group_sites(captured: CapturedGraph, regions: RegionMap, sites: Iterable[PruneSite]) -> list[SiteGroup]:
    """Sites by what they see, from the first to the last that runs."""
    places, depths = _order(captured, regions, {site.fqn for site in sites})
    members: dict[object, list[PruneSite]] = {}
    seen: dict[object, list[WeightUse]] = {}
    for site in sites:
        uses = [use for use in regions.evidence.get(site.fqn, ()) if _covers(use, site)]
        key = frozenset((use.activation, use.routed_by, use.reading, site.expert) for use in uses) or site.name
        members.setdefault(key, []).append(site)
        seen.setdefault(key, uses)
    groups = [
        SiteGroup(
            tuple(members[key]),
            max(1, len({(use.activation, use.reading) for use in uses})),
            min((depths[use.node] for use in uses), default=0),
            min((places[use.node] for use in uses), default=0),
        )
        for key, uses in seen.items()
    ]
    return sorted(groups, key=lambda group: (group.depth, group.place))


def _covers(use: WeightUse, site: PruneSite) -> bool:
    expert = site.expert or 0
    return (
        use.rows[0] <= site.rows[0] and site.rows[1] <= use.rows[1] and (site.expert is None or expert in range(*use.experts))
    )


def _order(captured: CapturedGraph, regions: RegionMap, fqns: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Name of every node -> its place, and how many pruned layers are on the longest way to it."""
    using = {use.node for fqn in fqns for use in regions.evidence.get(fqn, ())}
    places: dict[str, int] = {}
    reached: dict[fx.Node, int] = {}  # with the node itself
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node that it is a view of, or itself
    depths: dict[str, int] = {}
    for place, node in enumerate(captured.graph.nodes):
        sources = node.all_input_nodes
        depth = max((max(reached[source], reached[memory[source]]) for source in sources), default=0)
        places[node.name], depths[node.name] = place, depth
        reached[node] = depth + (node.name in using)
        memory[node] = memory[sources[0]] if sources and is_view(node) else node
        for written in written_arguments(node):
            reached[memory[written]] = max(reached[memory[written]], reached[node])
    return places, depths


def plan_stages(groups: Sequence[SiteGroup], budget_bytes: int, passes: int | None = None) -> list[list[SiteGroup]]:
    """Groups to be rewritten together, first to last.

    Args:
        groups: what ``group_sites`` gave.
        budget_bytes: what the Gram matrices of a stage may take; a single group that takes more is a stage of its own.
        passes: into how many stages of equal depth the layers are cut, fewer where there are fewer depths; the budget
            may make more of them. None gives every depth a stage.
    """
    depths = sorted({group.depth for group in groups})
    per_stage = 1 if passes is None else ceil(len(depths) / passes)
    stage_of = {depth: index // per_stage for index, depth in enumerate(depths)}
    stages: list[list[SiteGroup]] = []
    last, room = -1, 0
    for group in groups:
        if stage_of[group.depth] != last or group.size_bytes > room:
            stages.append([])
            last, room = stage_of[group.depth], budget_bytes
        stages[-1].append(group)
        room -= group.size_bytes
    return stages
