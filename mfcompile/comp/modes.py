"""Modes of joint pruning: what a model has of units and tokens that can go, by region and modality."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mfcompile.errors import InputError
from mfcompile.passes.modalities import TEXT
from mfcompile.passes.structured_units import StructuralUnit
from mfcompile.passes.token_sites import TokenSite

UNITS, TOKENS = "parameters", "tokens"


@dataclass(frozen=True)
class UnitMode:
    """The structural units of a region.

    Attributes:
        name: "parameters:<region>".
        units: in the dense model.
        share: how much of every unit may go; one element always stays.
    """

    name: str
    units: tuple[StructuralUnit, ...]
    share: float = 1.0

    def most(self, unit: StructuralUnit) -> int:
        """How many elements of a unit may go."""
        return min(unit.count - 1, int(self.share * unit.count + 1e-9))


@dataclass(frozen=True)
class TokenMode:
    """The tokens of a modality, cut at some sites; the share that stays is the same at each of them.

    Attributes:
        name: "tokens:<modality>", with the region behind an "@" where they run among others.
        sites: in order.
        share: how many of the tokens that may go at a site do so at most; one always stays.
    """

    name: str
    sites: tuple[TokenSite, ...]
    share: float = 1.0

    @property
    def is_text(self) -> bool:
        """Its tokens are words: few, and mostly read."""
        return self.sites[0].modality == TEXT

    @property
    def free(self) -> int:
        """Tokens of the first site that are not protected."""
        return self.sites[0].tokens - self.sites[0].protected

    @property
    def most(self) -> int:
        """How many tokens may go at the first site."""
        return min(self.free - 1, int(self.share * self.free + 1e-9))

    def keep(self, gone: int) -> dict[str, float]:
        """Site -> the share of arriving tokens that stays, where ``gone`` go at the first site."""
        return {site.name: (self.free - gone) / self.free for site in self.sites} if gone else {}


def left_of(unit: StructuralUnit, removed: Sequence[int]) -> list[int]:
    """Elements of a unit that are left, by their numbers in the dense model."""
    gone = set(removed)
    return [element for element in range(unit.count) if element not in gone]


def smaller_unit(unit: StructuralUnit, left: Sequence[int]) -> StructuralUnit:
    """A unit as it is in a graph that has only some of its elements left, numbered anew."""
    columns = sorted(column for element in left for column in unit.columns(element))
    places = {column: place for place, column in enumerate(columns)}
    inputs = tuple(tuple(places[column] for column in unit.columns(element)) for element in left)
    return replace(unit, count=len(left), inputs=inputs)


def unit_modes(units: Iterable[StructuralUnit], caps: Mapping[str, float]) -> list[UnitMode]:
    """A mode per region that has units of more than one element."""
    by_region: dict[str, list[StructuralUnit]] = {}
    for unit in units:
        if unit.count > 1:
            by_region.setdefault(unit.region or "untagged", []).append(unit)
    names = {region: f"{UNITS}:{region}" for region in by_region}
    return [UnitMode(names[region], tuple(own), caps.get(names[region], 1.0)) for region, own in by_region.items()]


def token_modes(sites: Iterable[TokenSite], caps: Mapping[str, float], at: Sequence[float]) -> list[TokenMode]:
    """A mode per modality, and place where its tokens run among others, of which tokens can be cut.

    Args:
        sites: what ``find_token_sites`` found.
        caps: mode -> how much may go.
        at: depths of the cuts among a mode's sites, from 0 to 1.
    """
    if not at or not all(0 <= depth <= 1 for depth in at):
        raise InputError(f"at={tuple(at)!r}: give depths between 0 and 1")
    groups: dict[str, list[TokenSite]] = {}
    for site in sites:
        if site.tokens - site.protected > 1:
            whose = site.modality or site.region
            among = f"@{site.region}" if site.region != whose else ""
            groups.setdefault(f"{TOKENS}:{whose}{among}", []).append(site)
    modes = []
    for name, own in groups.items():
        places = sorted({min(int(depth * len(own)), len(own) - 1) for depth in at})
        modes.append(TokenMode(name, tuple(own[place] for place in places), caps.get(name, 1.0)))
    return modes
