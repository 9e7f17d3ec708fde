"""What is asked for when a model is exported in parts, and what an exporter must know to divide it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mfcompile.errors import InputError
from mfcompile.recipe import SPLITS
from mfcompile.region import RegionMap


@dataclass(frozen=True)
class SplitRequest:
    """What the exporter must know of a model to divide it.

    Attributes:
        modalities: input name -> modality; None for control inputs.
        regions: parameter name -> region; every name of a tied parameter may be there.
        sizes: name of a dimension -> its size in the example; decides what is narrow.
    """

    modalities: Mapping[str, str | None]
    regions: Mapping[str, str]
    sizes: Mapping[str, int] = field(default_factory=dict)


def split_request(split: str | None, regions: RegionMap | None) -> SplitRequest | None:
    """The request for ``split``; None where one file is wanted.

    Args:
        split: "regions" or None.
        regions: the modalities of the inputs and the regions of the weights, the user's overrides included.

    Raises:
        InputError: there is no such way to split.
    """
    if split is None:
        return None
    if split not in SPLITS:
        raise InputError(f"split={split!r} is not known; choose {' or '.join(SPLITS)}, or None for one file")
    if regions is None:
        raise InputError(f"split={split!r} needs the regions of the model; pass what infer_regions gave")
    return SplitRequest({item.name: item.modality for item in regions.modalities}, dict(regions.weights))
