"""Least squares after a search: output weights of what lost units, on the tokens that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mfcompile.comp.loss import Loss
from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.structure import Structure
from mfcompile.graph import CapturedGraph
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.weight_values import with_values
from mfcompile.structure import kept_inputs, refit_removed, with_outputs
from mfcompile.tokens import prune_tokens


def refit_outputs(
    pruned: JointlyPruned,
    batches: Sequence[ExampleInputs],
    measure: Loss,
    modalities: Mapping[str, str] | None,
    padding_mask: str | None,
) -> JointlyPruned:
    """The result of a search with other output weights; what was taken stays taken.

    Args:
        pruned: what the search gave.
        batches: all calibration batches.
        measure: says how much worse than dense a module is.
        modalities, padding_mask: as in ``prune_jointly``.

    Raises:
        CalibrationError: the model refuses a batch.
    """
    dense, structure = pruned.dense, pruned.structure
    if not any(structure.removed.values()):
        return pruned
    asked = {} if padding_mask is None else {"padding_mask": padding_mask}
    seen = with_fewer_tokens(dense, structure, modalities)
    found = refit_removed(dense, structure.removed, batches, asked, seen=seen, modalities=modalities)
    refitted = replace(structure, refitted=tuple(sorted(found.values)))
    smaller = refitted.told_by(refitted.apply(with_outputs(dense, found.values), modalities))
    weights = {
        item.name: {"error": item.error / item.masked_error if item.masked_error else None, "left": item.left}
        for item in found.updates
    }
    smaller = replace(smaller, diagnostics=(*smaller.diagnostics, *found.diagnostics))
    told = {"loss": measure(smaller.module), "weights": weights}
    return replace(pruned, captured=smaller, structure=refitted, refit=told)


def with_fewer_tokens(dense: CapturedGraph, structure: Structure, modalities: Mapping[str, str] | None) -> CapturedGraph:
    """The dense model with the tokens of a structure: all its units are computed, and heads that go score no tokens.

    Args:
        dense: with the program that is cut.
        structure: what is taken.
        modalities: as in ``prune_jointly``.
    """
    if not structure.kept:
        return dense
    kept, _ = kept_inputs(dense, structure.removed, modalities=modalities)
    own = {fqn: dense.parameter(fqn).detach() for fqn in kept}
    zeros = {fqn: torch.where(mask.to(own[fqn].device), own[fqn], 0.0) for fqn, mask in kept.items()}
    how = structure.cutting
    fewer = prune_tokens(
        with_outputs(dense, zeros), structure.kept, scorer=how.scorer, rest=how.rest, restore=how.restore, modalities=modalities
    )
    return with_values(fewer, own)  # what the zeros say about heads is in the program by now
