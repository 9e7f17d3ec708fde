"""What is found out about a dense model once, and used by every pruning of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfcompile.passes.gradients import Gradients


@dataclass
class DenseFacts:
    """What several prunings of one dense model share: it is found out once. The same loss, batches and seed are meant.

    Attributes:
        gradients: None until a pruning has taken them.
        fingerprint: of the model; None until a pruning has asked for it.
    """

    gradients: Gradients | None = None
    fingerprint: str | None = None
