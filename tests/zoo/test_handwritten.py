"""Hand-written models: regions, sites and padding come out as the table says, whatever things are called."""

from __future__ import annotations

import fnmatch
import functools

import pytest
import torch

import mfcompile
from mfcompile.region import RegionMap
from tests.zoo.handwritten import CASES
from tests.zoo.renaming import rename

LENGTH = 6


@functools.cache
def inferred(name: str) -> RegionMap:
    case = CASES[name]
    captured = mfcompile.capture(case.make(), case.inputs(LENGTH))
    return mfcompile.infer_regions(captured, modalities=case.modalities)


def convolutions(found: RegionMap) -> set[str]:
    """Convolutions of patches are listed beside the linear weights; tests/unit/passes/test_convolutions.py has theirs."""
    return {fqn for fqn, uses in found.evidence.items() if uses[0].reading.patches is not None}


def last_match(name: str, table: dict[str, str]) -> str | None:
    return next((value for pattern, value in reversed(table.items()) if fnmatch.fnmatchcase(name, pattern)), None)


@pytest.mark.parametrize("name", CASES)
def test_regions(name: str) -> None:
    case, found = CASES[name], inferred(name)
    linear = {fqn: region for fqn, region in found.weights.items() if fqn not in convolutions(found)}
    assert linear == {fqn: last_match(fqn, dict(case.regions)) for fqn in linear}
    unmatched = [glob for glob in case.regions if not fnmatch.filter(found.weights, glob)]
    assert not unmatched


@pytest.mark.parametrize("name", CASES)
def test_sites(name: str) -> None:
    case = CASES[name]
    for site in inferred(name).sites:
        if site.fqn in convolutions(inferred(name)):
            continue
        reason = last_match(site.fqn, dict(case.dense))
        if reason is None:
            assert site.skipped is None, f"{site.name}: {site.skipped}"
        else:
            assert site.skipped is not None, site.name
            assert reason in site.skipped, site.name


@pytest.mark.parametrize("name", CASES)
def test_shared_weights(name: str) -> None:
    case = CASES[name]
    found = {site.fqn for site in inferred(name).sites if site.is_shared}
    expected = {fqn for fqn in inferred(name).weights if any(fnmatch.fnmatchcase(fqn, glob) for glob in case.shared)}
    assert found == expected


@pytest.mark.parametrize("name", CASES)
def test_random_names_change_nothing(name: str) -> None:
    case = CASES[name]
    plain = mfcompile.compile_pruned(case.make(), case.inputs(LENGTH), modalities=case.modalities)
    model = case.make()
    names = rename(model)
    renamed = mfcompile.compile_pruned(model, case.inputs(LENGTH), modalities=case.modalities)
    assert {names[fqn]: region for fqn, region in renamed.regions.weights.items()} == dict(plain.regions.weights)
    assert {names[fqn] for fqn in renamed.masks} == set(plain.masks)
    for fqn in renamed.masks:
        assert torch.equal(renamed.masks[fqn], plain.masks[names[fqn]]), names[fqn]
