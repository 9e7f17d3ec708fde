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
from safetensors.torch import save as serialize
from torch import Tensor, nn

from mfcompile.errors import InputError
from mfcompile.files import write_atomically
from mfcompile.graph import Diagnostic

FORMAT_VERSION = "1"

FORMAT_VERSION_WITH_VALUES = "2"
"""Files that also hold values: a reader that knows only masks must not take them for less than they are."""

FORMAT_VERSION_REFITTED = "3"
"""Files that also hold parameters of the model that the masks are for, which is not quite the one that was pruned."""

_VALUES = "values of "
_REFITTED = "refitted "
_READ = (FORMAT_VERSION, FORMAT_VERSION_WITH_VALUES, FORMAT_VERSION_REFITTED)


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
        sparsity: requested sparsity, the fraction removed: one, or region -> its own.
        new_values: FQN -> (kept_count,) new values of the weights that are kept, in the order of the stored parameter, where a
            weight update changed them; the other weights keep the model's own.
        diagnostics: what was decided by a weaker rule while the masks were chosen; not kept in files.
        refitted: FQN -> whole parameters of the model that the masks are for which differ from those of the model that units
            were removed from; nothing is applied of them with the masks.
    """

    packed: Mapping[str, PackedMask]
    regions: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    sparsity: float | Mapping[str, float] | None = None
    new_values: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()
    refitted: Mapping[str, Tensor] = field(default_factory=dict)

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

    def updated_weight(self, fqn: str, weight: Tensor) -> Tensor:
        """A weight with its new values where it is kept; pruned places hold what they held.

        Args:
            fqn: one of ``new_values``.
            weight: the parameter; not changed.
        """
        updated = weight.detach().clone(memory_format=torch.contiguous_format)
        updated[self[fqn].to(weight.device)] = self.new_values[fqn].to(weight.device, weight.dtype)
        return updated

    def digest(self) -> str:
        """sha256 over names, shapes, bits and new values; equal digests mean equal masks and values."""
        return self._digest(with_values=True)

    def mask_digest(self) -> str:
        """sha256 over names, shapes and bits alone.

        Masks come out the same on every machine; new values, which are solved for, only to the last bits of float32.
        """
        return self._digest(with_values=False)

    def _digest(self, *, with_values: bool) -> str:
        state = hashlib.sha256()
        for fqn in sorted(self.packed):
            mask = self.packed[fqn]
            state.update(f"{fqn}:{mask.shape}:".encode())
            state.update(mask.bits.tobytes())
            if with_values and fqn in self.new_values:
                values = self.new_values[fqn].detach().cpu().contiguous()
                state.update(f"values:{values.dtype}:".encode())
                state.update(values.view(torch.uint8).numpy().data)
        for fqn in sorted(self.refitted) if with_values else ():
            values = self.refitted[fqn].detach().cpu().contiguous()
            state.update(f"refitted:{fqn}:{tuple(values.shape)}:{values.dtype}:".encode())
            state.update(values.reshape(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()

    def save(self, path: Path | str) -> Path:
        """Write the masks as safetensors (packed bits, new values; metadata in strings), complete or not at all."""
        metadata = {
            "format": "mfcompile.masks",
            "format_version": self._format_version(),
            "sha256": self.digest(),
            "base_model_fingerprint": self.fingerprint,
            "sparsity": "" if self.sparsity is None else json.dumps(_plain(self.sparsity)),
            "shapes": json.dumps({fqn: list(mask.shape) for fqn, mask in self.packed.items()}),
            "regions": json.dumps(dict(self.regions)),
        }
        tensors = {fqn: torch.from_numpy(mask.bits) for fqn, mask in self.packed.items()}
        tensors |= {_VALUES + fqn: values.detach().cpu().contiguous() for fqn, values in self.new_values.items()}
        tensors |= {_REFITTED + fqn: values.detach().cpu().contiguous() for fqn, values in self.refitted.items()}
        data = serialize(tensors, metadata=metadata)
        return write_atomically(Path(path), data)

    def _format_version(self) -> str:
        if self.refitted:
            return FORMAT_VERSION_REFITTED
        return FORMAT_VERSION_WITH_VALUES if self.new_values else FORMAT_VERSION

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
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != "mfcompile.masks":
                    raise InputError(f"{path} is a safetensors file, but not of masks: its metadata names no mfcompile format")
                if metadata.get("format_version") not in _READ:
                    raise InputError(
                        f"{path} is of mask format {metadata.get('format_version')}; this version reads "
                        f"{', '.join(_READ[:-1])} and {_READ[-1]}. Write it again with this version of mfcompile"
                    )
                shapes = json.loads(metadata["shapes"])
                packed = {fqn: PackedMask(file.get_tensor(fqn).numpy(), tuple(shape)) for fqn, shape in shapes.items()}
                there = set(file.keys())
                values = {fqn: file.get_tensor(_VALUES + fqn) for fqn in shapes if _VALUES + fqn in there}
                refitted = {
                    key.removeprefix(_REFITTED): file.get_tensor(key) for key in sorted(there) if key.startswith(_REFITTED)
                }
                regions = dict(json.loads(metadata.get("regions", "{}")))
                sparsity = json.loads(metadata["sparsity"]) if metadata.get("sparsity") else None
        except InputError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as a masks file ({error}): it is damaged or truncated") from error
        for fqn, mask in packed.items():
            if mask.bits.dtype != np.uint8 or mask.bits.size != (mask.weight_count + 7) // 8:
                raise InputError(f"{path}: the mask of {fqn} does not hold {mask.weight_count} bits; the file is damaged")
        for fqn, kept in values.items():
            if kept.shape != (packed[fqn].kept_count,):
                raise InputError(
                    f"{path}: {fqn} has {kept.numel()} new values for {packed[fqn].kept_count} kept weights; it is damaged"
                )
        masks = cls(packed, regions, metadata.get("base_model_fingerprint", ""), sparsity, values, refitted=refitted)
        if masks.digest() != metadata.get("sha256"):
            raise InputError(f"{path}: the masks do not match their sha256; the file is damaged. Prune again, or use a backup")
        return masks


def _plain(sparsity: float | Mapping[str, float]) -> float | dict[str, float]:
    return dict(sparsity) if isinstance(sparsity, Mapping) else sparsity


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and bytes of all parameters and buffers of a module."""
    state = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
