"""What was taken out of a model: enough to do it again, and to tell a file's reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mfcompile.comp.space import Cutting
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.weight_values import with_values
from mfcompile.structure import remove_units
from mfcompile.tokens import prune_tokens, with_program_for

STRUCTURE_KEY = "mfcompile.structure"
"""Metadata of a program: JSON of what was taken out of the model."""


@dataclass(frozen=True)
class Structure:
    """What was taken out of a model; enough to do it again.

    Attributes:
        removed: unit -> elements that are gone, by their numbers in the dense model.
        kept: token site -> the share of arriving unprotected tokens that stays.
        cutting: how tokens are cut.
        refitted: FQNs of parameters that got other values for what was taken; the values are not told.
    """

    removed: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, float]
    cutting: Cutting
    refitted: tuple[str, ...] = ()

    def apply(self, captured: CapturedGraph, modalities: Mapping[str, str] | None = None) -> CapturedGraph:
        """Take the same out of another capture of the model, whose values stay.

        Raises:
            InputError: it has no such unit or site.
        """
        if self.kept:
            captured = with_program_for(captured, self.kept, modalities=modalities)
        smaller = remove_units(captured, self.removed, modalities=modalities) if self.removed else captured
        if not self.kept:
            return smaller
        how = self.cutting
        return prune_tokens(smaller, self.kept, scorer=how.scorer, rest=how.rest, restore=how.restore, modalities=modalities)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Structure:
        """What ``as_dict`` gave."""
        removed = {name: tuple(elements) for name, elements in plain["removed"].items()}
        cutting = Cutting(plain["scorer"], plain["rest"], plain["restore"])
        return cls(removed, dict(plain["kept"]), cutting, tuple(plain.get("refitted", ())))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        removed = {name: list(elements) for name, elements in sorted(self.removed.items())}
        how = {"scorer": self.cutting.scorer, "rest": self.cutting.rest, "restore": self.cutting.restore}
        refitted = {"refitted": sorted(self.refitted)} if self.refitted else {}
        return {"removed": removed, "kept": dict(sorted(self.kept.items())), **how, **refitted}

    def told_by(self, captured: CapturedGraph) -> CapturedGraph:
        """A graph without these units and tokens, with a program whose files say so."""
        assert captured.exported is not None  # programs are what is cut
        metadata = {**captured.exported.metadata, STRUCTURE_KEY: json.dumps(self.as_dict(), sort_keys=True)}
        return replace(captured, exported=replace(captured.exported, metadata=metadata))

    def digest(self) -> str:
        """sha256 of what was taken."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def repeat_structure(
    captured: CapturedGraph,
    metadata: Mapping[str, str],
    modalities: Mapping[str, str] | None = None,
    refitted: Mapping[str, Tensor] | None = None,
) -> CapturedGraph | None:
    """A model without the units and tokens that a file is without, by what its metadata say; None where they say nothing.

    Args:
        captured: the whole model.
        metadata: of the file.
        modalities: as in ``prune_jointly``.
        refitted: FQN -> values of the parameters that the file says were refitted, as ``MaskSet.refitted`` has them.

    Raises:
        InputError: it is another model, or a parameter was refitted and there are no values of it.
    """
    told = metadata.get(STRUCTURE_KEY)
    if told is None:
        return None
    structure = Structure.of(json.loads(told))
    smaller = structure.apply(captured, modalities)
    values = {fqn: tensor for fqn, tensor in (refitted or {}).items() if fqn in structure.refitted}
    for fqn in structure.refitted:
        if fqn not in values:
            raise InputError(
                f"{fqn} was refitted after units were removed, and the file's metadata do not say its values. They are in the "
                f"masks.safetensors that was written with the file: give it with --masks"
            )
        if values[fqn].shape != (shape := smaller.parameter(fqn).shape):
            raise InputError(f"the refitted {fqn} is {tuple(values[fqn].shape)}, the model's {tuple(shape)}: of another model")
    return with_values(smaller, values) if values else smaller
