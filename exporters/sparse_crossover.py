"""Whether a pruned layer is faster with the sparse kernel than as a dense product with its decoded weight."""

from __future__ import annotations

from math import log2

import numpy as np

CACHE_BYTES = 32 << 20
"""Dense weights of a model that is larger come from memory on every run, where a sparse weight is the smaller one to read."""

CROSSOVERS = {
    True: ((1, 0.46), (2, 0.73), (4, 0.76), (8, 0.49), (16, 0.46), (64, 0.31)),
    False: ((1, 0.16), (4, 0.21), (32, 0.21), (64, 0.31)),
}
"""Whether weights stay in the cache -> tokens, and the sparsity from which the sparse kernel is as fast as dense onnxruntime.

One thread with AVX-512, unstructured masks. In the cache: ``crossover`` and ``layers`` of
``benchmarks/results/sparse_kernels.json`` (768 x 768; it loses at 63 % with 2 to 4 tokens: a dense product reads its weight
once for up to four tokens, and takes hardly longer for them than for one).
From memory: ``streamed`` of ``benchmarks/results/sparse_export.json`` (layers of 3072 x 768; with one token it wins wherever
packing saves anything, with 4 to 32 it breaks even at about 20 %). Up to the first entry and from the last one on, the sparsity
stays that of the entry.
"""


def least_sparsity(tokens: int | None, model_bytes: int) -> float:
    """The sparsity from which a layer is as fast with the sparse kernel; where they tie, it still takes less memory.

    Args:
        tokens: rows of X in the example inputs; None where they are not known: many are assumed.
        model_bytes: bytes of all dense weights of the model.
    """
    points = CROSSOVERS[model_bytes <= CACHE_BYTES]
    counts = [log2(count) for count, _ in points]
    return float(np.interp(counts[-1] if tokens is None else log2(max(1, tokens)), counts, [least for _, least in points]))
