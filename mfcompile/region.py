"""Regions: which modality each weight serves, with the evidence, and which weights may be pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mfcompile.graph import Diagnostic

UNTAGGED = "untagged"
FUSION = "fusion"

Labels = frozenset[str]
"""The modalities that reach a value; empty for constants, masks, positions and sizes."""

NO_LABELS: Labels = frozenset()


@dataclass(frozen=True)
class InputModality:
    """What one input was taken for.

    Attributes:
        name: input name.
        modality: "vision", "text", "audio", ... or None for a control input (a mask, positions, sizes).
        reason: the rule that decided.
    """

    name: str
    modality: str | None
    reason: str


@dataclass(frozen=True)
class WeightUse:
    """One node that contracts an activation with (rows of) a stored linear weight.

    Attributes:
        node: name of the contracting node.
        fqn: the stored parameter.
        rows: output rows of the weight that this node uses, [start, stop).
        is_transposed: the parameter is stored (in_features, out_features).
        activation: name of the node that gives the activation.
        feature_dim: dimension of the activation that is contracted, counted from the end (-1 or -2).
        stack: paths of the submodules that were running, outermost first.
        label: modalities that reach the activation.
        block: path of the repeated block around the call, or None.
        block_label: modalities that leave that block; empty without a block.
    """

    node: str
    fqn: str
    rows: tuple[int, int]
    is_transposed: bool
    activation: str
    feature_dim: int
    stack: tuple[str, ...]
    label: Labels = NO_LABELS
    block: str | None = None
    block_label: Labels = NO_LABELS


@dataclass(frozen=True)
class PruneSite:
    """A linear weight, or a range of its output rows that sees an input of its own.

    Attributes:
        name: the FQN, followed by "[start:stop]" where only these rows are meant.
        fqn: the stored parameter.
        rows: output rows, [start, stop).
        out_features: number of output rows of the site.
        in_features: number of inputs of each row.
        is_transposed: the parameter is stored (in_features, out_features).
        region: name of the region.
        tied_with: other names of the same parameter.
        is_shared: several calls of the weight receive different modalities.
        skipped: why the site is not pruned; None for a site that is.
    """

    name: str
    fqn: str
    rows: tuple[int, int]
    out_features: int
    in_features: int
    is_transposed: bool
    region: str
    tied_with: tuple[str, ...] = ()
    is_shared: bool = False
    skipped: str | None = None

    @property
    def weight_count(self) -> int:
        """out_features * in_features."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class RegionMap:
    """The regions of a captured model.

    Attributes:
        modalities: what each input was taken for.
        weights: FQN of every linear weight -> name of its region.
        evidence: FQN -> every use of the weight, with the labels that decided.
        sites: every linear weight as prune sites, in ``named_parameters`` order; skipped ones carry the reason.
        overrides: FQN -> the user's pattern that set its region.
        diagnostics: what was decided by a weaker rule, or left alone.
    """

    modalities: tuple[InputModality, ...]
    weights: Mapping[str, str]
    evidence: Mapping[str, tuple[WeightUse, ...]]
    sites: tuple[PruneSite, ...]
    overrides: Mapping[str, str]
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def pruned_sites(self) -> tuple[PruneSite, ...]:
        """The sites that are pruned."""
        return tuple(site for site in self.sites if site.skipped is None)

    @property
    def skipped_sites(self) -> tuple[PruneSite, ...]:
        """The sites that are left dense, each with its reason in ``skipped``."""
        return tuple(site for site in self.sites if site.skipped is not None)

    def by_region(self) -> dict[str, tuple[PruneSite, ...]]:
        """Region -> its pruned sites, regions in order of first appearance."""
        grouped: dict[str, list[PruneSite]] = {}
        for site in self.pruned_sites:
            grouped.setdefault(site.region, []).append(site)
        return {region: tuple(sites) for region, sites in grouped.items()}

    def __str__(self) -> str:
        lines = [f"RegionMap({len(self.weights)} linear weights, {len(self.pruned_sites)} sites pruned)"]
        lines += [f"  input {item.name}: {item.modality or 'control'} ({item.reason})" for item in self.modalities]
        for region, sites in self.by_region().items():
            lines.append(f"  {region}: {len(sites)} sites, {sum(site.weight_count for site in sites):,} weights")
        return "\n".join(lines)
