"""MaskSet: the packed masks of a model, and the file that keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize
from torch import Tensor, nn

from mfcompile.errors import InputError
from mfcompile.files import write_atomically

FORMAT_VERSION = "1"


@dataclass(frozen=True, eq=False)
class PackedMask:
    """One mask, one bit per weight (numpy.packbits order), 1 = kept.

    Attributes:
        bits: (ceil(n / 8),) uint8.
        shape: shape of the weight, as the parameter is stored; (out_features, in_features) for nn.Linear.
    """

    bits: NDArray[np.uint8]
    shape: tuple[int, ...]

    @classmethod
    def pack(cls, mask: Tensor) -> PackedMask:
        """Pack a bool tensor of any shape."""
        return cls(np.packbits(mask.cpu().numpy().reshape(-1)), tuple(mask.shape))

    def unpack(self) -> Tensor:
        """The bool tensor, of ``shape``."""
        count = int(np.prod(self.shape))
        return torch.from_numpy(np.unpackbits(self.bits, count=count).astype(bool).reshape(self.shape))

    @property
    def kept_count(self) -> int:
        """How many weights are kept."""
        return int(np.bitwise_count(self.bits).sum())

    @property
    def weight_count(self) -> int:
        """How many weights there are."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, eq=False)
class MaskSet(Mapping[str, Tensor]):
    """FQN -> bool mask in the layout of the parameter ((out, in) for nn.Linear), 1 = kept.

    Two sets are equal when their masks are (by digest), whatever model they were made for.

    Attributes:
        packed: FQN -> packed mask.
        regions: FQN -> region of the weight.
        fingerprint: fingerprint of the model that the masks were made for ("" when unknown).
        sparsity: requested sparsity, the fraction removed.
    """

    packed: Mapping[str, PackedMask]
    regions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    sparsity: float | None = None

    def __getitem__(self, fqn: str) -> Tensor:
        return self.packed[fqn].unpack()

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, MaskSet) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())

    @property
    def kept_count(self) -> int:
        """Kept weights over all masks."""
        return sum(mask.kept_count for mask in self.packed.values())

    @property
    def weight_count(self) -> int:
        """Weights over all masks."""
        return sum(mask.weight_count for mask in self.packed.values())

    def digest(self) -> str:
        """sha256 over names, shapes and bits; equal digests mean equal masks."""
        state = hashlib.sha256()
        for fqn in sorted(self.packed):
            mask = self.packed[fqn]
            state.update(f"{fqn}:{mask.shape}:".encode())
            state.update(mask.bits.tobytes())
        return state.hexdigest()

    def save(self, path: Path | str) -> Path:
        """Write the masks as safetensors (packed bits; metadata in strings), complete or not at all."""
        metadata = {
            "format": "mfcompile.masks",
            "format_version": FORMAT_VERSION,
            "sha256": self.digest(),
            "base_model_fingerprint": self.fingerprint,
            "sparsity": "" if self.sparsity is None else repr(self.sparsity),
            "shapes": json.dumps({fqn: list(mask.shape) for fqn, mask in self.packed.items()}),
            "regions": json.dumps(dict(self.regions)),
        }
        data = serialize({fqn: mask.bits for fqn, mask in self.packed.items()}, metadata=metadata)
        return write_atomically(Path(path), data)

    @classmethod
    def load(cls, path: Path | str) -> MaskSet:
        """Read masks and check their digest.

        Raises:
            InputError: the file is missing, is no mask file, is of another format version, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no masks file at {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "mfcompile.masks":
                    raise InputError(f"{path} is a safetensors file, but not of masks: its metadata names no mfcompile format")
                if metadata.get("format_version") != FORMAT_VERSION:
                    raise InputError(
                        f"{path} is of mask format {metadata.get('format_version')}; this version reads {FORMAT_VERSION}. "
                        f"Write it again with this version of mfcompile"
                    )
                shapes = json.loads(metadata["shapes"])
                packed = {fqn: PackedMask(file.get_tensor(fqn), tuple(shape)) for fqn, shape in shapes.items()}
                regions = dict(json.loads(metadata.get("regions", "{}")))
                sparsity = float(metadata["sparsity"]) if metadata.get("sparsity") else None
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a masks file ({error}): it is damaged or truncated") from error
        for fqn, mask in packed.items():
            if mask.bits.dtype != np.uint8 or mask.bits.size != (mask.weight_count + 7) // 8:
                raise InputError(f"{path}: the mask of {fqn} does not hold {mask.weight_count} bits; the file is damaged")
        masks = cls(packed, regions, metadata.get("base_model_fingerprint", ""), sparsity)
        if masks.digest() != metadata.get("sha256"):
            raise InputError(f"{path}: the masks do not match their sha256; the file is damaged. Prune again, or use a backup")
        return masks


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of all parameters and buffers of a module."""
    state = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
