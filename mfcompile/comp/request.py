"""Joint pruning as something to ask for beside masks: what ``compile_pruned``, recipes and the command line call a method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mfcompile.comp.one_shot import prune_jointly
from mfcompile.comp.options import CompOptions
from mfcompile.comp.result import JointlyPruned
from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.mask_selection import SelectionOptions

METHOD = "comp"

DEFAULT_FLOPS = 0.5


@dataclass(frozen=True)
class JointRequest:
    """What is asked of joint pruning.

    Attributes:
        flops: the share of the dense FLOPs that is to stay.
        options: how.
        criterion: what masks on what is left are chosen by; None puts no masks.
    """

    flops: float
    options: CompOptions
    criterion: str | None = None

    @property
    def method(self) -> str:
        """Its name."""
        return METHOD if self.criterion is None else f"{METHOD}+{self.criterion}"

    def apply(
        self,
        captured: CapturedGraph,
        calibration: Iterable[Any] | None,
        evaluate: Callable[[Any], Any] | None,
        modalities: Mapping[str, str] | None,
        padding_mask: str | None,
        progress: Callable[[int, int | None], None] | None,
    ) -> JointlyPruned:
        """The model without units and tokens; see ``prune_jointly``."""
        return prune_jointly(
            captured,
            flops=self.flops,
            calibration=calibration,
            evaluate=evaluate if self.options.loss == "evaluate" else None,
            options=self.options,
            modalities=modalities,
            padding_mask=padding_mask,
            progress=progress,
        )

    def mask_options(self, options: SelectionOptions) -> SelectionOptions:
        """How masks are chosen of what is left: as asked for, or none at all.

        Raises:
            InputError: masks are asked for, and the method has none, or another criterion than the method's.
        """
        if self.criterion is not None:
            if options.criterion not in ("multiflow", self.criterion):
                named = getattr(options.criterion, "name", options.criterion)
                raise InputError(f"method {self.method!r} masks by {self.criterion}, and the criterion is {named!r}: give one")
            return replace(options, criterion=self.criterion)
        asked = {
            "sparsity": options.sparsity not in (None, 0),
            "allocation": options.allocation is not None,
            "pattern": options.pattern != "unstructured",
            "update": options.update is not None,
        }
        odd = next((name for name, is_asked in asked.items() if is_asked), None)
        if odd is not None:
            raise InputError(
                f"method 'comp' removes units and tokens and masks no weights: {odd} says nothing to it. For masks on what is "
                f"left, take method 'comp+multiflow'"
            )
        return replace(options, sparsity=0.0, criterion="magnitude", criterion_options={})


def method_request(
    method: str | None, flops: float | None, options: Mapping[str, Any] | None, seed: int = 0
) -> JointRequest | None:
    """What a method asks for before masks; None where it asks for masks alone.

    Args:
        method: None or "masks", "comp", or "comp+" and the name of a criterion.
        flops: the share that is to stay; None for 0.5.
        options: see ``CompOptions``.
        seed: of the search, where the options name none.

    Raises:
        InputError: there is no such method, or it has no such option.
    """
    if method in (None, "masks"):
        odd = "flops" if flops is not None else "method_options" if options else None
        if odd is not None:
            raise InputError(f"{odd} is for method 'comp', which removes units and tokens; masks leave FLOPs as they are")
        return None
    name, plus, criterion = str(method).partition("+")
    if name != METHOD or (plus and not criterion):
        raise InputError(f"method={method!r} is not known; choose masks, comp, or comp+multiflow (or comp+ another criterion)")
    asked = CompOptions.of({"seed": seed, **(options or {})})
    share = DEFAULT_FLOPS if flops is None else flops
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise InputError(f"flops={share!r} is not in (0, 1]: it is the share of the dense FLOPs that stays, such as 0.5")
    return JointRequest(float(share), asked, criterion or None)


def joined_digest(masks: str, structure: str) -> str:
    """One digest of masks and of what was taken out before them."""
    return hashlib.sha256(f"{structure}:{masks}".encode()).hexdigest()
