"""How far an exported file may be from the module that it was made from, by the precision of its values."""

from __future__ import annotations

from typing import NamedTuple

from mfcompile.errors import InputError

INT8_SHARE = 0.1
"""Largest error of an output of an int8 file, as a share of the output's largest magnitude.

Measured: 0.8 to 1.7 % for one layer; 3.4 % for the example model over 60 scenes, and 5.8 % with 63 % of it pruned
(``python -m benchmarks.int8_kernels`` and ``benchmarks.int8_accuracy``). Errors of layers add like independent ones, so that
three times the dense error leaves room for nine times the layers. What was measured for a file is in its report.
"""

WORLDS_SHARE = 0.01
"""Largest difference between stock onnxruntime and the sparse kernels on an int8 file, as a share of the same."""


class Tolerance(NamedTuple):
    """Allowed: atol + rtol |expected|, atol as a share of the largest magnitude where it is ``of_range``."""

    rtol: float
    atol: float
    of_range: bool


def is_of_range(values: str) -> bool:
    """Whether the atol of ``default_tolerance`` is a share of the largest magnitude of an output."""
    return values == "int8"


def default_tolerance(values: str) -> tuple[float, float]:
    """(rtol, atol) for an artefact whose masked weights are stored in this precision.

    "fp32": 1e-3 and 1e-4. Both sides compute in float32 with sums in different orders. A sum of K products is off by
    about sqrt(K) 6e-8 of its scale: 2e-6 for K = 1024, a few 1e-5 of the scale after dozens of layers. 1e-4 leaves
    room for that on outputs of order one (normalised embeddings, logits near zero), 1e-3 on large ones, and both are
    far below what a wrong weight does: masking one weight more moves outputs by its share of a sum, 1e-3 and more.
    "fp16": 2e-2 and 1e-2. The module keeps its float32 weights, the file rounds them: each is off by up to
    2^-11 = 4.9e-4 of itself, 2.8e-4 on average, independently, so a layer's output is off by 2.8e-4 of its scale and
    that of 24 layers by about 1.4e-3; the largest of 1e6 elements is five times that, 7e-3.

    "int8": 0 and INT8_SHARE, of the range of each output (``is_of_range``): rounding of activations does not shrink with an
    element, and it is the sum of a model's layers, so no bound on single elements holds.

    Outputs much larger than one with elements near zero (unnormalised hidden states) need an atol of 1e-4 of their
    scale; pass it.
    """
    known = {"fp32": (1e-3, 1e-4), "fp16": (2e-2, 1e-2), "int8": (0.0, INT8_SHARE)}
    if values not in known:
        raise InputError(f"values={values!r} is not known; choose one of {', '.join(known)}")
    return known[values]
