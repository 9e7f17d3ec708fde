"""The families of models that are compared."""

from __future__ import annotations

import importlib

from benchmarks.tavlp.families.contract import Family

FAMILIES = {"xvlm": "benchmarks.tavlp.families.xvlm:XVLM", "blip": "benchmarks.tavlp.families.blip:BLIP"}
"""Name -> module and object, imported when it is used."""


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        SystemExit: there is none.
    """
    if name not in FAMILIES:
        raise SystemExit(f"there is no family {name!r}; choose one of {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(importlib.import_module(module), attribute)
    return found
