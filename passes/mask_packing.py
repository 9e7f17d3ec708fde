"""Masks of many sites at once: in threads, and from scores that nobody holds in full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mfcompile.graph import CapturedGraph
from mfcompile.masks import PackedMask
from mfcompile.passes import pieces
from mfcompile.passes.mask_selection import parameter_mask
from mfcompile.passes.pieces import spread
from mfcompile.region import PruneSite

Progress = Callable[[int, int | None], None]

_PIECES_APART = 8
"""A site of more pieces is shared out among threads itself where it is a large part of all there is to do."""


def kept_bits_by_site(
    groups: Mapping[str, Sequence[PruneSite]],
    bits_of: Callable[[PruneSite], NDArray[np.uint8]],
    progress: Progress | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, NDArray[np.uint8]]:
    """What every site keeps, sites in threads; the memory needed on top is that of a few pieces per thread.

    Args:
        groups: FQN -> sites of that parameter.
        bits_of: (ceil(n / 8),) bits of what a site keeps, 1 = kept; called in threads, and may share work out itself.
        progress: called with (parameters done, parameters in all), by one thread at a time.
        meanwhile: called once, by one of the threads.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    left = {fqn: len(group) for fqn, group in groups.items()}
    done, lock = 0, threading.Lock()

    def keep(site: PruneSite) -> None:
        nonlocal done
        bits = bits_of(site)
        with lock:
            found[site.name] = bits
            left[site.fqn] -= 1
            done += not left[site.fqn]
            if progress is not None and not left[site.fqn]:
                progress(done, len(groups))

    def work(queue: Iterator[Callable[[], object]]) -> None:
        for task in queue:
            task()

    sites = [site for group in groups.values() for site in group]
    share = sum(site.weight_count for site in sites) // (2 * torch.get_num_threads())
    share = max(share, _PIECES_APART * pieces.PIECE)
    for site in sites:
        if site.weight_count > share:  # it keeps all threads busy
            keep(site)
    tasks: list[Callable[[], object]] = [meanwhile]
    tasks += [partial(keep, site) for site in sites if site.weight_count <= share]
    spread(work, tasks)
    return found


def packed_mask(captured: CapturedGraph, sites: Sequence[PruneSite], bits: Mapping[str, NDArray[np.uint8]]) -> PackedMask:
    """The mask of one parameter from the bits of what its sites keep; rows of no site are kept.

    Args:
        captured: the captured model.
        sites: the sites of the parameter.
        bits: site name -> bits, as of ``kept_bits_by_site``.
    """
    shape, layout = tuple(captured.parameter(sites[0].fqn).shape), sites[0].layout
    order = (*layout.experts, *layout.outputs, *layout.inputs)
    if len(sites) == 1 and sites[0].weight_count == prod(shape) and order == tuple(range(len(shape))):
        return PackedMask(bits[sites[0].name], shape)

    def kept(site: PruneSite) -> Tensor:
        flat = np.unpackbits(bits[site.name], count=site.weight_count).view(np.bool_)
        return torch.from_numpy(flat.reshape(site.out_features, site.in_features))

    return PackedMask.pack(parameter_mask(captured, sites, kept))
