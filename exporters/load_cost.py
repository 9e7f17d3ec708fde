"""What stock onnxruntime takes to create a session of a file: predicted from the file alone, and held to a machine's memory.

**Memory**: tensors inside the .onnx file twice (as protobuf and as tensors), external ones once, and everything that folding
the decode nodes makes, because onnxruntime keeps all of it until the folding is done (``EncodingPlan.folded_bytes``).
**Time**, relative to the dense file: most of it goes into memory that is written for the first time, so it is counted in bytes;
the gather that decodes a mask costs about eight more for every place. The constants are of ``python -m benchmarks.formats``,
onnxruntime 1.31, one thread; there predictions of memory are within 15 % of what is measured, and most of those of time within
a factor of 1.5.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mfcompile.errors import ExportError

DENSE_COST = 1.6
"""Time of a byte of a dense tensor, in that of a byte that folding makes."""

MASK_COST = 8.0
"""Time of gathering one place of a mask."""

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class StoredPlan(Protocol):
    """How a weight is stored, as far as loading it goes; see ``packing.EncodingPlan``."""

    @property
    def encoding(self) -> str: ...  # noqa: D102
    @property
    def stored_bytes(self) -> int: ...  # noqa: D102
    @property
    def folded_bytes(self) -> int: ...  # noqa: D102
    @property
    def weight_count(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class LoadCost:
    """What creating a session takes in stock onnxruntime, predicted.

    Attributes:
        peak_bytes: memory at its highest.
        time_ratio: time, relative to the dense file's.
    """

    peak_bytes: int
    time_ratio: float


def predict_load(inline_bytes: int, data_bytes: int, plans: Iterable[StoredPlan], dense_bytes: int) -> LoadCost:
    """Memory and time of creating a session.

    Args:
        inline_bytes: the .onnx file.
        data_bytes: its external data.
        plans: the masked weights.
        dense_bytes: the dense file with its external data.
    """
    plans = list(plans)
    peak = 2 * inline_bytes + data_bytes + sum(plan.folded_bytes for plan in plans)
    packed = [plan for plan in plans if plan.folded_bytes]
    others = dense_bytes - sum(4 * plan.weight_count for plan in packed)
    cost = DENSE_COST * max(others, 0) + sum(map(load_time, packed))
    return LoadCost(peak, cost / max(DENSE_COST * dense_bytes, 1))


def load_time(plan: StoredPlan) -> float:
    """Time of loading a packed weight, in that of a byte that folding makes."""
    gather = MASK_COST * plan.weight_count if plan.encoding == "mask" else 0.0
    return plan.stored_bytes + plan.folded_bytes + gather


def machine_memory() -> int | None:
    """Bytes of memory that this process may have at most; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def refuse_unloadable(name: str, cost: LoadCost, dense_bytes: int) -> None:
    """Refuse to write a file that stock onnxruntime could not load here; the export could not be verified.

    Raises:
        ExportError: says prediction, memory, and what to do.
    """
    memory = machine_memory()
    if memory is None or cost.peak_bytes <= memory or cost.peak_bytes <= 2 * dense_bytes:
        return
    raise ExportError(
        f"{name} was not written: stock onnxruntime would take about {cost.peak_bytes / 1e9:.1f} GB of memory to create a "
        f"session of it, and this machine has {memory / 1e9:.1f} GB (the dense file takes about {dense_bytes / 1e9:.1f} GB). "
        f"Set a lower load budget (--load-budget, load_budget=; it takes {cost.peak_bytes / max(dense_bytes, 1):.1f} now), so "
        f"that weights are stored in ways that need less, or write it dense (--format dense), or export on a larger machine: "
        f"mfcompile.load_session and mfcompile unpack then read it with the dense file's memory"
    )
