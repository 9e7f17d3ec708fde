"""Padding: which mask input says that a token is padding, and which token input it speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph, InputSpec
from mfcompile.passes.modalities import VISION, table_rows
from mfcompile.region import InputModality


@dataclass(frozen=True)
class PaddingMask:
    """A mask input and the token input that it belongs to.

    Attributes:
        mask: (batch, length), of two values.
        tokens: (batch, length) token ids, or (batch, length, width) embeddings.
        is_inverted: 1 is padding, as in torch's ``key_padding_mask``; else 1 is a token.
    """

    mask: str
    tokens: str
    is_inverted: bool = False

    def padding(self, mask: Tensor) -> Tensor:
        """Bool of the mask's sizes, True where there is padding. A mask of 0 and large negative numbers is added to logits."""
        if mask.is_floating_point() and bool((mask < 0).any()):
            return mask < 0
        return mask != 0 if self.is_inverted else mask == 0


@dataclass(frozen=True)
class PaddingPlan:
    """The padding masks of a model; where their padding goes is followed while it runs.

    Attributes:
        masks: every pair of a mask input and a token input.
    """

    masks: tuple[PaddingMask, ...] = ()


def find_padding_masks(
    captured: CapturedGraph, modalities: Iterable[InputModality], given: str | None = None
) -> tuple[PaddingMask, ...]:
    """The padding masks among the inputs: named by the user, else by convention, shape and values.

    A two-valued control input of the sizes of a token input is its padding mask when its name says mask, or, where
    names say nothing, when its zeros (ones) lie at the ends of its rows and it looks up no table. Of several token
    inputs of these sizes it belongs to those of the same name stem, and to those that repeat one token wherever it
    says padding.

    Raises:
        InputError: ``given`` is no input, or no (batch, length) tensor.
    """
    modality = {item.name: item.modality for item in modalities}
    tensors = captured.example_inputs.tensors()
    contents = [
        spec
        for spec in captured.inputs
        if modality[spec.name] is not None and len(spec.shape) >= 2 and (modality[spec.name] != VISION or len(spec.shape) == 3)
    ]
    if given is not None and (given not in tensors or tensors[given].ndim != 2):
        raise InputError(
            f"padding_mask={given!r} is no (batch, length) input; the model's inputs are "
            f"{', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}"
        )
    if given is not None:
        candidates = [spec for spec in captured.inputs if spec.name == given]
    else:
        tables = table_rows(captured)
        controls = [spec for spec in captured.inputs if modality[spec.name] is None and spec.name not in tables]
        candidates = [spec for spec in controls if _is_mask(tensors[spec.name], spec.name)]
    pairs = [
        (content, mask)
        for content in contents
        for mask in candidates
        if _fits(mask.shape, content.shape)
        and (modality[content.name] != VISION or mask.name == given or _stem(content.name) == _stem(mask.name))
    ]
    found = []
    for content, mask in pairs:
        rivals = [other for other, same in pairs if same is mask and other is not content]
        others = [other for same, other in pairs if same is content and other is not mask]
        if _claim(content, mask, tensors) >= max(
            [_claim(rival, mask, tensors) for rival in rivals] + [_claim(content, other, tensors) for other in others],
            default=0,
        ):
            found.append(PaddingMask(mask.name, content.name, _is_inverted(tensors[mask.name], tensors[content.name])))
    unique = {item.tokens: item for item in reversed(found)}
    return tuple(item for item in found if unique[item.tokens] is item)


def _fits(mask: tuple[int, ...], content: tuple[int, ...]) -> bool:
    return mask in (content, content[:2], content[:-1])


def _claim(content: InputSpec, mask: InputSpec, tensors: Mapping[str, Tensor]) -> int:
    """How much speaks for a mask to belong to a token input: names first, then values."""
    named = 2 if _stem(content.name) == _stem(mask.name) and _says_mask(mask.name) else 0
    return named + (1 if _repeats_one_token(tensors[mask.name], tensors[content.name]) else 0)


def _stem(name: str) -> str:
    """A name without the words for tokens and masks: what pairs ``decoder_input_ids`` with ``decoder_attention_mask``."""
    return _KIND.sub("", name.rpartition(".")[2].lower()).strip("_")


_KIND = re.compile(
    r"attention_mask|attn_mask|padding_mask|pad_mask|masked|mask|atts?|input_ids|token_ids|inputs_embeds|embeds|feat(ure)?s|ids|tokens?|input"
)


def _is_mask(mask: Tensor, name: str) -> bool:
    values = torch.unique(mask)
    is_additive = mask.is_floating_point() and values.numel() <= 2 and float(values.min()) < -1 and float(values.max()) == 0
    if mask.ndim < 2 or not (is_additive or bool(((values == 0) | (values == 1)).all())):
        return False
    return _says_mask(name) or is_additive or _looks_padded(mask)


def _repeats_one_token(mask: Tensor, tokens: Tensor) -> bool:
    """The places that are padding, whichever way round the mask is, hold one token, and the others hold several."""
    if tokens.is_floating_point() or mask.shape != tokens.shape:
        return False
    one, zero = (int(torch.unique(tokens[mask == value]).numel()) for value in (1, 0))
    return min(one, zero) == 1 and max(one, zero) > 1


def _is_inverted(mask: Tensor, tokens: Tensor) -> bool:
    """1 is padding: some text would have no token otherwise, or the ones repeat one token and the zeros do not."""
    if not bool((mask == 1).flatten(1).any(dim=1).all()):
        return True
    if tokens.is_floating_point() or mask.shape != tokens.shape:
        return False
    one, zero = (torch.unique(tokens[mask == value]) for value in (1, 0))
    return one.numel() == 1 and zero.numel() > 1 and not bool((zero == one).any())


def _says_mask(name: str) -> bool:
    leaf = name.rpartition(".")[2].lower()
    return "mask" in leaf or leaf.endswith(("att", "atts"))


def _looks_padded(mask: Tensor) -> bool:
    """In every row ones lie at one end and zeros at the other, and no row is all padding (whichever of them it is)."""
    steps = mask.long().diff(dim=-1)
    is_one_sided = bool(((steps <= 0).all(dim=-1) | (steps >= 0).all(dim=-1)).all())
    rows = mask != 0
    return is_one_sided and (bool(rows.any(dim=-1).all()) or not bool(rows.all(dim=-1).any()))
