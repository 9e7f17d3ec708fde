"""Regions: which modality each weight serves, with the evidence, and which weights may be pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

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
class WeightLayout:
    """What the dimensions of a stored parameter count: a weight is one matrix, or a stack of them (experts).

    Several dimensions of one kind are read together, in their order: a convolution of patches is
    ``WeightLayout(outputs=(0,), inputs=(1, 2, 3))``, experts that are stored (experts, in, out) are
    ``WeightLayout(outputs=(2,), inputs=(1,), experts=(0,))``.

    Attributes:
        outputs: dimensions that count output features.
        inputs: dimensions that count input features, which the layer sums over.
        experts: dimensions that count matrices, each with an input of its own; empty for a single matrix.
    """

    outputs: tuple[int, ...] = (0,)
    inputs: tuple[int, ...] = (1,)
    experts: tuple[int, ...] = ()

    @property
    def is_transposed(self) -> bool:
        """The matrices are stored (in_features, out_features)."""
        return self.inputs[0] < self.outputs[0]

    def sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(experts, out_features, in_features) of a parameter of that shape; one expert where it is a single matrix."""
        experts, outputs, inputs = (prod(shape[dim] for dim in dims) for dims in (self.experts, self.outputs, self.inputs))
        return experts, outputs, inputs

    def matrices(self, parameter: Tensor) -> Tensor:
        """(experts, out_features, in_features): a view of the parameter where strides allow, else a copy."""
        order = (*self.experts, *self.outputs, *self.inputs)
        return parameter.permute(order).reshape(self.sizes(parameter.shape))

    def stored(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The parameter of that shape from its matrices (experts, out_features, in_features); ``matrices`` undone."""
        order = (*self.experts, *self.outputs, *self.inputs)
        places = [order.index(dim) for dim in range(len(order))]
        return matrices.reshape([shape[dim] for dim in order]).permute(places)


ROWS = WeightLayout()
"""(out_features, in_features), as nn.Linear stores its weight."""

COLUMNS = WeightLayout(outputs=(1,), inputs=(0,))
"""(in_features, out_features)."""


@dataclass(frozen=True)
class Patches:
    """The patches that a convolution cuts its input into: they do not overlap.

    Attributes:
        kernel: size of a patch along every spatial dimension.
        stride: step from patch to patch, at least the size.
        padding: zeros on either side.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """How a contraction reads its activation: which dimensions are features, and which rows meet which expert.

    Attributes:
        features: dimensions that are summed over, counted from the end, in the order of the weight's inputs. With
            ``patches`` they count in the activation cut into patches.
        experts: dimensions of the activation along which the expert changes, counted from the end; empty where every row
            meets the same matrix.
        routing: what the routing operand holds: "ends" (the row after the last of every expert), "index" (the expert of
            every place along ``experts``), or "" without one; then ``experts`` counts the experts themselves.
        patches: the patches that a convolution cuts the activation into.
    """

    features: tuple[int, ...] = (-1,)
    experts: tuple[int, ...] = ()
    routing: str = ""
    patches: Patches | None = None


@dataclass(frozen=True)
class WeightUse:
    """One node that contracts an activation with (rows of) a stored linear weight.

    Attributes:
        node: name of the contracting node.
        fqn: the stored parameter.
        rows: output rows of the weight that this node uses, [start, stop), of every expert it uses.
        layout: what the dimensions of the parameter count.
        activation: name of the node that gives the activation.
        reading: how the activation is read.
        stack: paths of the submodules that were running, outermost first.
        experts: experts that this node uses, [start, stop); (0, 1) for a single matrix.
        routed_by: name of the node that says which rows meet which expert, or None.
        label: modalities that reach the activation.
        block: path of the repeated block around the call, or None.
        block_label: modalities that leave that block; empty without a block.
    """

    node: str
    fqn: str
    rows: tuple[int, int]
    layout: WeightLayout
    activation: str
    reading: Reading
    stack: tuple[str, ...]
    experts: tuple[int, int] = (0, 1)
    routed_by: str | None = None
    label: Labels = NO_LABELS
    block: str | None = None
    block_label: Labels = NO_LABELS

    def overlaps(self, other: WeightUse) -> bool:
        """Some row of some expert is in both uses."""
        pairs = ((self.rows, other.rows), (self.experts, other.experts))
        return all(one[0] < two[1] and two[0] < one[1] for one, two in pairs)


@dataclass(frozen=True)
class PruneSite:
    """A linear weight, one expert of a stack of them, or a range of output rows that sees an input of its own.

    Attributes:
        name: the FQN, followed by "[3]" where one expert is meant, and by "[start:stop]" where only these rows are.
        fqn: the stored parameter.
        rows: output rows, [start, stop).
        out_features: number of output rows of the site.
        in_features: number of inputs of each row.
        layout: what the dimensions of the parameter count.
        region: name of the region.
        tied_with: other names of the same parameter.
        is_shared: several calls of the weight receive different modalities.
        skipped: why the site is not pruned; None for a site that is.
        expert: number of the expert in the stack; None for a single matrix.
    """

    name: str
    fqn: str
    rows: tuple[int, int]
    out_features: int
    in_features: int
    layout: WeightLayout
    region: str
    tied_with: tuple[str, ...] = ()
    is_shared: bool = False
    skipped: str | None = None
    expert: int | None = None

    @property
    def is_transposed(self) -> bool:
        """The matrix is stored (in_features, out_features)."""
        return self.layout.is_transposed

    @property
    def weight_count(self) -> int:
        """out_features * in_features."""
        return self.out_features * self.in_features

    def matrix(self, matrices: Tensor) -> Tensor:
        """(out_features, in_features) of the site, a view of all matrices of its parameter (``layout.matrices``)."""
        return matrices[self.expert or 0, self.rows[0] : self.rows[1]]


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
