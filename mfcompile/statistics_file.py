"""The file that keeps calibration statistics: two tensors, whatever the number of sites."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from mfcompile.errors import InputError
from mfcompile.files import write_atomically
from mfcompile.graph import Diagnostic
from mfcompile.statistics import CalibrationStatistics, SiteStatistics

FORMAT = "mfcompile.statistics"
FORMAT_VERSION = "1"
WEIGHTED_VERSION = "2"
"""Of files whose norms are weighted: readers of version 1 would take them for plain ones."""

_HELP = "Calibrate again"

_Arrays = Mapping[str, NDArray[Any]]


def save_statistics(statistics: CalibrationStatistics, path: Path) -> Path:
    """Write statistics, complete or not at all.

    ``sums`` holds the sums of squares of all sites one after the other, (in_features of all sites,) float64; ``counts``
    is (sites, 4) int64: in_features, tokens, padding, samples. A model of thousands of experts has a header as short. Where
    tokens were weighed, ``norms`` holds the sums of weighted norms like ``sums`` (zero where there are none), ``norm_counts``
    (sites,) int64 the samples in them, -1 where there are none.

    Raises:
        InputError: the folder cannot be written to.
    """
    sites = statistics.sites.values()
    parts = [site.sum_of_squares.cpu().numpy() for site in sites]
    sums = np.concatenate(parts) if parts else np.zeros(0, np.float64)
    counts = np.array(
        [[site.sum_of_squares.numel(), site.token_count, site.padding_count, site.sample_count] for site in sites], np.int64
    ).reshape(-1, 4)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "sites": json.dumps(list(statistics.sites)),
        "batch_count": str(statistics.batch_count),
        "source": statistics.source,
        "observed_by": statistics.observed_by,
        "padding_masks": json.dumps(statistics.padding_masks),
        "diagnostics": json.dumps([[item.subject, item.reason] for item in statistics.diagnostics]),
        "base_model_fingerprint": statistics.fingerprint,
    }
    arrays = {"sums": sums, "counts": counts}
    if statistics.weighting != "none":
        metadata |= {"format_version": WEIGHTED_VERSION, "weighting": statistics.weighting}
        norms = [(torch.zeros_like(site.sum_of_squares) if site.norm_sum is None else site.norm_sum).cpu() for site in sites]
        arrays["norms"] = torch.cat(norms).numpy() if norms else np.zeros(0, np.float64)
        arrays["norm_counts"] = np.array([-1 if site.norm_sum is None else site.norm_count for site in sites], np.int64)
    metadata["sha256"] = _digest(metadata, arrays.values())
    return write_atomically(path, serialize(arrays, metadata=metadata))


def load_statistics(path: Path) -> CalibrationStatistics:
    """Read what ``save_statistics`` wrote, to the bit.

    Raises:
        InputError: the file is missing, holds no statistics, is of another format version, or is damaged.
    """
    if path.is_dir():
        raise InputError(f"no statistics file at {path}, but a folder")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise InputError(
                    f"{path} is a safetensors file, but not of calibration statistics: its metadata names "
                    f"{metadata.get('format', 'no mfcompile format')}"
                )
            if metadata.get("format_version") not in {FORMAT_VERSION, WEIGHTED_VERSION}:
                raise InputError(
                    f"{path} is of statistics format {metadata.get('format_version')}; this version reads {FORMAT_VERSION} "
                    f"and {WEIGHTED_VERSION}. "
                    f"{_HELP} with this version of mfcompile"
                )
            names = ("sums", "counts", *(("norms", "norm_counts") if "weighting" in metadata else ()))
            arrays = {name: file.get_tensor(name) for name in names}
        if metadata.pop("sha256", None) != _digest(metadata, arrays.values()):
            raise InputError(f"{path}: the statistics do not match their sha256; the file is damaged. {_HELP}, or use a backup")
        return _statistics(metadata, arrays)
    except InputError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no statistics file at {path}") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read as a statistics file ({error}): it is damaged or truncated. {_HELP}"
        ) from error


def _statistics(metadata: Mapping[str, str], arrays: _Arrays) -> CalibrationStatistics:
    sums, counts = arrays["sums"], arrays["counts"]
    weighting = metadata.get("weighting", "none")
    none = np.full(len(counts), -1)
    norms, norm_counts = arrays.get("norms", sums), arrays.get("norm_counts", none)
    if sums.dtype != np.float64 or counts.dtype != np.int64:
        raise ValueError(f"sums are {sums.dtype} and counts are {counts.dtype}")
    ends = np.cumsum(counts[:, 0])
    if sums.size != (ends[-1] if len(ends) else 0) or norms.size != sums.size:
        raise ValueError(f"{sums.size} sums for {counts[:, 0].sum()} features")
    sites = {}
    for name, end, (width, tokens, padding, samples), normed in zip(
        json.loads(metadata["sites"]), ends.tolist(), counts.tolist(), norm_counts.tolist(), strict=True
    ):
        own = SiteStatistics(torch.from_numpy(sums[end - width : end].copy()), tokens, padding, samples)
        if normed >= 0:
            weighted = torch.from_numpy(norms[end - width : end].copy())
            own = replace(own, weighting=weighting, norm_sum=weighted, norm_count=normed)
        elif weighting != "none":
            own = replace(own, weighting="uniform")
        sites[name] = own
    return CalibrationStatistics(
        sites,
        int(metadata["batch_count"]),
        metadata["source"],
        metadata["observed_by"],
        tuple(json.loads(metadata["padding_masks"])),
        tuple(Diagnostic(subject, reason) for subject, reason in json.loads(metadata["diagnostics"])),
        metadata["base_model_fingerprint"],
        weighting,
    )


def _digest(metadata: Mapping[str, str], arrays: Iterable[NDArray[Any]]) -> str:
    """sha256 over everything that is stored."""
    state = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for array in arrays:
        state.update(f"{array.dtype}{array.shape};".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()
