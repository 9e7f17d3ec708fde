"""Where a packed file has its parameters: what its metadata say, so that a reader needs no knowledge of the graph.

The entry ``mfcompile.weights`` of the metadata of an .onnx file (of each part of a split model) names every packed parameter
and the initializers that hold it. These are ``<fqn>.gaps`` (of a bit mask ``<fqn>.mask``) and ``<fqn>.values``, or, in a file
that has such names already, ``mfcompile.<fqn>.gaps`` and so on. A parameter that nodes decode is a value named by its FQN;
one that SparseLinear nodes read is no value at all. The kernels want W as (N, K): a parameter that the graph multiplies as
X W is stored as its transpose, which the entry says. Every parameter has tensors of its own, also where several layers read
one X.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mfcompile.errors import InputError

DOMAIN = "mfcompile"
"""Domain of the sparse operators."""

WEIGHTS_KEY = "mfcompile.weights"
"""Metadata: JSON of FQN -> the fields of its StoredWeight."""

INT8_KEY = "mfcompile.int8_weights"
"""Metadata: JSON of FQN -> the encoding, block (inputs of a place) and shape (N, K) of every weight that SparseLinearInt8 nodes
read; of its initializers ``<fqn>.gaps``, ``<fqn>.values`` and ``<fqn>.scales``, see ``quantization``."""


@dataclass(frozen=True)
class StoredWeight:
    """How a file stores one packed parameter.

    Attributes:
        encoding: see ``packing``.
        shape: shape of the parameter.
        tensors: names of the initializers that hold it, in the order gaps (or mask), values.
        is_transposed: they hold the transpose of the parameter.
        is_sparse: SparseLinear nodes read it; otherwise nodes decode it.
    """

    encoding: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    is_transposed: bool = False
    is_sparse: bool = False


def describe_weights(weights: Mapping[str, StoredWeight]) -> str:
    """What ``mfcompile.weights`` says of a file's packed parameters."""
    return json.dumps({fqn: asdict(weight) for fqn, weight in weights.items()}, separators=(",", ":"))


def read_weights(metadata: Mapping[str, str], source: Path | str = "the file") -> dict[str, StoredWeight]:
    """FQN -> how it is stored, of every packed parameter; {} of a file that says nothing.

    Args:
        metadata: of the model.
        source: its file, for the message of an error.

    Raises:
        InputError: the entry cannot be read.
    """
    try:
        found = json.loads(metadata.get(WEIGHTS_KEY, "{}"))
        return {
            fqn: StoredWeight(**{**item, "shape": tuple(item["shape"]), "tensors": tuple(item["tensors"])})
            for fqn, item in found.items()
        }
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{source} has metadata {WEIGHTS_KEY} that cannot be read ({error}). Export it again") from error
