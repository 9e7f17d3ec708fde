"""The search that both ways of joint pruning make: in one shot, and inside fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfcompile.comp.candidates import Candidates
from mfcompile.comp.options import CompOptions
from mfcompile.comp.result import JointlyPruned
from mfcompile.comp.scoring import CalibratedScores
from mfcompile.comp.space import Cutting, ModelSpace
from mfcompile.comp.structure import Structure
from mfcompile.errors import InputError
from mfcompile.graph import Diagnostic
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.mode_search import SearchOptions, search_modes
from mfcompile.steps import infer_regions

Progress = Callable[[int, int | None], None]

_SEARCH_OPTIONS = ("strategy", "step", "exploration", "temperature", "memory", "horizon", "tolerance", "order", "seed")


@dataclass(frozen=True)
class JointSearch:
    """A search over what of a model may go.

    Attributes:
        options: what is asked for.
        candidates: what may go.
        samples: batches that units are scored on.
        modalities, padding_mask: as in ``prune_jointly``.
    """

    options: CompOptions
    candidates: Candidates
    samples: Sequence[ExampleInputs]
    modalities: Mapping[str, str] | None
    padding_mask: str | None

    @property
    def cutting(self) -> Cutting:
        """How tokens are cut."""
        return Cutting(self.options.token_scorer, self.options.rest, self.options.restore)

    @property
    def space_options(self) -> dict[str, Any]:
        """Arguments of a ``ModelSpace``, but for what measures and spends."""
        dense = self.candidates.dense
        return {
            "dense": dense,
            "modes": self.candidates.modes,
            "score": CalibratedScores(self.options.scorer, self.samples, self.modalities, self.padding_mask),
            "cutting": self.cutting,
            "modalities": self.modalities,
            "layouts": {site.fqn: site.layout for site in infer_regions(dense, modalities=self.modalities).sites},
            "mode_step": self.options.mode_step,
        }

    def run(self, space: ModelSpace, flops: float, progress: Progress | None) -> JointlyPruned:
        """Prune until a share of the FLOPs is left.

        Args:
            space: made with ``space_options``.
            flops: the share.
            progress: see ``prune_jointly``.

        Raises:
            InputError: the share is none, or cannot be reached.
        """
        options, skipped = self.options, self.candidates.skipped
        _check_reachable(space, flops, options, skipped)
        search = SearchOptions(**{name: getattr(options, name) for name in _SEARCH_OPTIONS})
        found = search_modes(space, flops, search, progress)
        structure = Structure(dict(found.state.removed), space.keep(found.state.gone), self.cutting)
        return JointlyPruned(
            captured=structure.told_by(found.state.captured),
            dense=self.candidates.dense,
            structure=structure,
            stages=found.stages,
            modes=self.candidates.modes,
            capped=found.capped,
            skipped=skipped,
            options=options,
            target=flops,
            flops=(space.start().total, found.state.total),
        )


def least(*numbers: int | None) -> int | None:
    """The smallest of the numbers that are there."""
    return min((number for number in numbers if number is not None), default=None)


def _check_reachable(space: ModelSpace, flops: float, options: CompOptions, skipped: Sequence[Diagnostic]) -> None:
    """Refuse a target below what all modes together can reach, before anything is searched.

    Raises:
        InputError: says how far they reach, and what is in none of them.
    """
    if isinstance(flops, bool) or not isinstance(flops, (int, float)) or not 0 < flops <= 1:
        raise InputError(f"flops={flops!r} is not in (0, 1]: it is the share of the dense FLOPs that stays, such as 0.5")
    least = space.flops(space.least())
    if least <= flops * (1 + options.tolerance):
        return
    why = [f"with all of {', '.join(space.modes)} gone that may go, {least:.3f} of the FLOPs are left"]
    if any(share < 1 for share in options.caps.values()):
        why.append(f"the caps are {dict(options.caps)}")
    if skipped:
        why.append(f"not in any mode: {'; '.join(str(item) for item in skipped[:3])}")
    raise InputError(
        f"flops={flops:g} cannot be reached: {'; '.join(why)}. Ask for {least:.3f} or more, raise caps, or name more modes"
    )
