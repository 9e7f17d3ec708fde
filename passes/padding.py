"""Padding: which mask input says that a token is padding, and which activations it speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph, Diagnostic, InputSpec
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.modalities import VISION, table_rows
from mfcompile.region import InputModality

CallKey = tuple[str, int]
"""FQN of a weight, and which of its calls in one forward."""

_EXTRA = 3
"""Tokens that are appended to tell the text axis from axes of equal length."""


@dataclass(frozen=True)
class PaddingMask:
    """A mask input and the token input that it belongs to (shapes (batch, length); 1 = a token, 0 = padding)."""

    mask: str
    tokens: str


@dataclass(frozen=True)
class PaddingPlan:
    """Which activations a padding mask covers.

    Attributes:
        masks: the padding masks of the model.
        covered: call of a weight -> the mask whose tokens its rows are; a call that is missing is not covered.
        by_shape: FQNs for which the plan could not be made by running a longer text: rows count as text when shape
            and labels say so.
        diagnostics: what was decided by a weaker rule.
    """

    masks: tuple[PaddingMask, ...] = ()
    covered: Mapping[CallKey, str] = field(default_factory=dict)
    by_shape: frozenset[str] = frozenset()
    diagnostics: tuple[Diagnostic, ...] = ()

    def keep(self, call: CallKey, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Which rows of an activation are tokens.

        Args:
            call: the weight and which of its calls this is.
            shape: leading sizes of the activation, without the feature dimension.
            tensors: the inputs of this batch, by name.

        Returns:
            bool, of ``shape``; None when no padding mask covers the activation.
        """
        names = [self.covered[call]] if call in self.covered else []
        if not names and call[0] in self.by_shape:
            names = [item.mask for item in self.masks]
        for name in names:
            mask = tensors.get(name)
            if mask is not None:
                aligned = align(mask != 0, shape)
                if aligned is not None:
                    return aligned
        return None


def align(mask: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Spread a (batch, length) mask over the leading sizes of an activation.

    Sizes may be (batch, length), (batch * length,), or (batch, ..., length) with heads or groups between.
    """
    batch, length = mask.shape
    if shape == (batch * length,):
        return mask.reshape(-1)
    if len(shape) >= 2 and shape[0] == batch and shape[-1] == length:
        return mask.reshape(batch, *[1] * (len(shape) - 2), length).expand(shape)
    if len(shape) > 2 and shape[:2] == (batch, length):
        return mask.reshape(batch, length, *[1] * (len(shape) - 2)).expand(shape)
    return None


def find_padding_masks(
    captured: CapturedGraph, modalities: Iterable[InputModality], given: str | None = None
) -> tuple[PaddingMask, ...]:
    """The padding masks among the inputs: named by the user, else by convention and shape.

    A 0/1 control input of the shape of a token input is its padding mask when its name says mask, or, among inputs
    whose names say nothing, when every row is ones with zeros at one end only and it looks up no table.

    Raises:
        InputError: ``given`` is no input, or no (batch, length) tensor.
    """
    modality = {item.name: item.modality for item in modalities}
    tensors = captured.example_inputs.tensors()
    contents = [spec for spec in captured.inputs if modality[spec.name] not in (None, VISION) and len(spec.shape) >= 2]
    if given is not None:
        if given not in tensors or tensors[given].ndim != 2:
            raise InputError(
                f"padding_mask={given!r} is no (batch, length) input; the model's inputs are "
                f"{', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}"
            )
        contents = [spec for spec in contents if spec.shape[:2] == tuple(tensors[given].shape)]
        return tuple(PaddingMask(given, spec.name) for spec in contents[:1]) or (PaddingMask(given, given),)
    controls = [spec for spec in captured.inputs if modality[spec.name] is None]
    found = []
    for content in contents:
        matching = [spec for spec in controls if spec.shape == content.shape[:2] and _is_binary(tensors[spec.name])]
        named = [spec for spec in matching if _says_mask(spec.name)]
        silent = [spec for spec in matching if spec not in named and _looks_padded(captured, spec, tensors[spec.name])]
        best = max(named, key=lambda spec: _shared_prefix(spec.name, content.name), default=silent[0] if silent else None)
        if best is not None:
            found.append(PaddingMask(best.name, content.name))
    return tuple(found)


def lengthen(captured: CapturedGraph, mask: PaddingMask) -> ExampleInputs | None:
    """The example inputs with padding appended to one text; None when the text cannot be told from other inputs.

    Every input of shape (batch, length, ...) with the sizes of the mask grows by the same amount: the mask by zeros,
    the others by repeats of their last column.
    """
    inputs = captured.example_inputs
    size = tuple(inputs.tensors()[mask.mask].shape)

    def grow(name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape[:2]) != size or (tensor.is_floating_point() and tensor.ndim > 3):
            return tensor
        last = tensor[:, -1:].expand(tensor.shape[0], _EXTRA, *tensor.shape[2:])
        return torch.cat([tensor, torch.zeros_like(last) if name == mask.mask else last], dim=1)

    return inputs.map_tensors(grow)


def covers_text(before: tuple[int, ...], after: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether an activation has the text axis, from its leading sizes with the text as it is and longer.

    Args:
        before, after: leading sizes of the activation with the example and with the lengthened example.
        size: (batch, length) of the mask in the example.
    """
    batch, length = size
    if before == (batch * length,) and after == (batch * (length + _EXTRA),):
        return True
    if len(before) != len(after) or before == after or before[0] != batch:
        return False
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    return differing == [(length, length + _EXTRA)]


def _is_binary(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def _says_mask(name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return "mask" in leaf or leaf.endswith(("att", "atts"))


def _looks_padded(captured: CapturedGraph, spec: InputSpec, mask: Tensor) -> bool:
    if spec.name in table_rows(captured):
        return False
    steps = mask.long().diff(dim=1)
    is_one_sided = bool(((steps <= 0).all(dim=1) | (steps >= 0).all(dim=1)).all())
    return is_one_sided and bool((mask != 0).any(dim=1).all())


def _shared_prefix(one: str, other: str) -> int:
    length = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        length += 1
    return length
