"""Why pruners differ or do not: which weights they share, how much each layer keeps, how unequal the inputs of layers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mfcompile
from benchmarks.tavlp.configuration import Scale, config_hash, mask_config
from benchmarks.tavlp.families import FAMILIES
from benchmarks.tavlp.families import family as family_of
from benchmarks.tavlp.families.contract import Family
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.pruning import Folders, calibrated, masks_of
from benchmarks.tavlp.records import read_record, write_record
from benchmarks.tavlp.summary import table, title
from mfcompile.passes.mask_agreement import agreement

REFERENCE = "multiflow"
COMPARED = ("without-multimodality", "omp", "lamp", "wanda", "without-distribution")
SPARSITY = 0.9
SEED = 0


def differences_of(family: Family, scale: Scale, folders: Folders) -> dict[str, Any]:
    """What sets the pruners of a family apart, from its file or found out now (in half a minute).

    Returns:
        ``shared``: pruner -> fraction of the kept weights that MULTIFLOW keeps too; ``by_chance``: what random masks share;
        ``least_kept``: pruner -> fraction that the emptiest layer keeps; ``unread``: pruner -> fraction of the inputs of all
        layers of which no weight is kept, so that no fine-tuning brings them back; ``input_spread`` and ``weight_spread``:
        standard deviation over mean of the input norms of a layer and of its sizes of weights, median over layers.
    """
    path = folders.results / family.name / f"differences-{SPARSITY:g}-{SEED}.json"
    config = differences_config(family, scale)
    record = read_record(path, config_hash(config))
    if record is None:
        write_record(path, config, _found(family, scale, folders))
        record = read_record(path, config_hash(config))
        assert record is not None
    return record


def differences_config(family: Family, scale: Scale) -> dict[str, Any]:
    """All that they depend on."""
    return {
        "version": 2,
        "masks": [mask_config(family, PRUNERS[name], SPARSITY, SEED, scale) for name in (REFERENCE, *COMPARED)],
    }


def _found(family: Family, scale: Scale, folders: Folders) -> dict[str, Any]:
    captured, regions, statistics = calibrated(family, SEED, scale.calibration)
    sites = regions.pruned_sites
    masks = {name: masks_of(family, PRUNERS[name], SPARSITY, SEED, scale, folders) for name in (REFERENCE, *COMPARED)}
    pairs = agreement({name: found.packed for name, found in masks.items()}, sites).pairs[0][1:]
    norms = [statistics.sites[site.name].input_norm() for site in sites]
    sizes = [captured.parameter(site.fqn).detach().abs() for site in sites]
    return {
        "shared": {name: pair.shared_fraction for name, pair in zip(COMPARED, pairs, strict=True)},
        "by_chance": pairs[0].shared_by_chance,
        "least_kept": {
            name: min(mask.kept_count / mask.weight_count for mask in found.packed.values()) for name, found in masks.items()
        },
        "unread": {name: unread_inputs(found) for name, found in masks.items()},
        "input_spread": median(float(norm.std() / norm.mean()) for norm in norms),
        "weight_spread": median(float(size.std() / size.mean()) for size in sizes),
    }


def unread_inputs(masks: mfcompile.MaskSet) -> float:
    """Fraction of the input features of all layers that no kept weight reads; weights are (out_features, in_features)."""
    read = [masks[fqn].any(dim=0) for fqn in masks]
    return 1 - sum(int(item.sum()) for item in read) / sum(len(item) for item in read)


def differences(scale: Scale, folders: Folders, families: Sequence[str] = tuple(FAMILIES)) -> str:
    """A table of pruners against MULTIFLOW, from the records that are there, and a sentence on inputs."""
    records: dict[str, dict[str, Any]] = {}
    for name in families:
        owner = family_of(name)
        path: Path = folders.results / owner.name / f"differences-{SPARSITY:g}-{SEED}.json"
        record = read_record(path, config_hash(differences_config(owner, scale)))
        if record is not None:
            records[name] = record
    if not records:
        return "Not looked into: `python -m benchmarks.tavlp differences`."
    rows = []
    for pruner in (*COMPARED, REFERENCE):
        row = [title(pruner)]
        for record in records.values():
            figures = (record["shared"].get(pruner, 1.0), record["least_kept"][pruner], record["unread"][pruner])
            row += [f"{100 * figure:.1f}" for figure in figures]
        rows.append(row)
    kinds = ("kept that MULTIFLOW keeps", "emptiest layer keeps", "inputs without a weight")
    headings = [f"{name}: {what}" for name in records for what in kinds]
    notes = [
        f"{name}: random masks share {100 * record['by_chance']:.1f} %; within a layer the norms of inputs scatter by "
        f"{100 * record['input_spread']:.0f} % of their mean, the sizes of weights by {100 * record['weight_spread']:.0f} % "
        f"(standard deviation, median over layers)."
        for name, record in records.items()
    ]
    return table([f"at {100 * SPARSITY:.0f} %, in %", *headings], rows) + "\n\n" + "\n".join(notes)
