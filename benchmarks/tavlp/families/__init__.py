"""The families of models that are compared."""

from __future__ import annotations

import importlib

from benchmarks.tavlp.families.contract import Family

FAMILIES = {"xvlm": "benchmarks.tavlp.families.xvlm:XVLM", "blip": "benchmarks.tavlp.families.blip:BLIP"}
"""Name -> module and object, imported when it is used."""
VARIANTS = {"xvlm-text-x2": "benchmarks.tavlp.families.unequal:UNEQUAL_XVLM"}
"""Families that one question alone is asked of; a run has them only where they are named."""


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        SystemExit: there is none.
    """
    known = FAMILIES | VARIANTS
    if name not in known:
        raise SystemExit(f"there is no family {name!r}; choose one of {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    found: Family = getattr(importlib.import_module(module), attribute)
    return found
