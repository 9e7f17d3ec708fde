"""Rows of the zoo's table: an architecture, how its default configuration is made tiny, and inputs. A row is data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 99
"""Rows of every word table; special tokens lie below FIRST_WORD."""

FIRST_WORD = 40


@dataclass(frozen=True)
class Noise:
    """Float content, standard normal.

    Attributes:
        shape: sizes.
        scale: standard deviation.
    """

    shape: tuple[int, ...]
    scale: float = 1.0

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor."""
        return torch.randn(self.shape, generator=generator) * self.scale


@dataclass(frozen=True)
class Ids:
    """Token ids, drawn from [FIRST_WORD, VOCABULARY).

    Attributes:
        shape: sizes, tokens last.
        place: position (along the last dimension; negative counts from the end) -> token at that place in every row.
        runs: (first position, count, token) for runs of placeholders.
    """

    shape: tuple[int, ...]
    place: Mapping[int, int] = field(default_factory=dict)
    runs: tuple[tuple[int, int, int], ...] = ()
    high: int = VOCABULARY

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor, int64."""
        found = torch.randint(FIRST_WORD, self.high, self.shape, generator=generator)
        for start, count, token in self.runs:
            found[..., start : start + count] = token
        for position, token in self.place.items():
            found[..., position] = token
        return found


@dataclass(frozen=True)
class Fill:
    """One number everywhere: a mask of ones, token types of zeros.

    Attributes:
        shape: sizes.
        value: the number.
        dtype: name of a torch dtype.
    """

    shape: tuple[int, ...]
    value: float = 1
    dtype: str = "int64"

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor."""
        return torch.full(self.shape, self.value, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class PaddingMask:
    """Ones, but the last ``padding`` tokens of the last sample.

    Attributes:
        shape: (batch, tokens).
        padding: how many tokens of the last sample are padding.
        dtype: name of a torch dtype.
    """

    shape: tuple[int, int]
    padding: int = 2
    dtype: str = "int64"

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor."""
        found = torch.ones(self.shape, dtype=getattr(torch, self.dtype))
        if self.padding:
            found[-1, -self.padding :] = 0
        return found


@dataclass(frozen=True)
class Values:
    """Literal numbers: grids, sizes, boxes.

    Attributes:
        values: nested sequences of numbers.
        dtype: name of a torch dtype.
    """

    values: Any
    dtype: str = "int64"

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor."""
        return torch.tensor(self.values, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Joined:
    """Parts side by side along the last dimension, as floats: coordinates and then content.

    Attributes:
        parts: specifications of tensors whose other dimensions agree.
    """

    parts: tuple[Values | Noise, ...]

    def make(self, generator: torch.Generator) -> Tensor:
        """The tensor, float32."""
        return torch.cat([part.make(generator).float() for part in self.parts], dim=-1)


@dataclass(frozen=True)
class Raw:
    """An argument that is no tensor: a flag, a string.

    Attributes:
        value: passed as it is.
    """

    value: Any

    def make(self, generator: torch.Generator) -> Any:
        """The value."""
        return self.value


Spec = Noise | Ids | Fill | PaddingMask | Values | Joined | Raw

STAGES = ("build", "run", "capture", "regions", "prune", "masks", "module", "onnx", "parity")
"""What is done with a row, in order; a row that fails has the failing stage and the reason."""

DROP: Any = "<drop>"
"""In a row's configuration: leave the key out, so that the configuration class derives it."""


@dataclass(frozen=True)
class Row:
    """One class of transformers and how to run a tiny one.

    Attributes:
        name: name of the class in ``transformers``.
        kind: what goes in: "vision-text", "video-text", "audio-text", "all", "vision", "text", "audio", "other".
        inputs: argument of forward -> what to make; a batch of two or more wherever the model takes one.
        config: laid over the shrunk default configuration (see ``build.tiny_config``), nested mappings key by key.
        config_class: name in ``transformers``, where it is not the model's ``config_class``.
        variant: tells rows of one class apart ("t5", "video").
        plain_config: take ``config`` as all arguments of the configuration class; do not shrink its defaults.
        modalities: input -> modality, where an input's name and shape do not tell; the less the better.
        note: what is not obvious.
    """

    name: str
    kind: str
    inputs: Mapping[str, Spec]
    config: Mapping[str, Any] = field(default_factory=dict)
    config_class: str | None = None
    variant: str = ""
    plain_config: bool = False
    modalities: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """Name and variant: unique in the table."""
        return f"{self.name}[{self.variant}]" if self.variant else self.name


def text(length: int = 7, *, batch: int = 2, padding: int = 2, **ids: Any) -> dict[str, Spec]:
    """``input_ids`` and ``attention_mask``; padding comes last."""
    return {"input_ids": Ids((batch, length), **ids), "attention_mask": PaddingMask((batch, length), padding)}


def image(size: int = 16, *, batch: int = 2, channels: int = 3, name: str = "pixel_values") -> dict[str, Spec]:
    """Square images."""
    return {name: Noise((batch, channels, size, size))}


def images(count: int, size: int = 16, *, batch: int = 2) -> dict[str, Spec]:
    """Several square images for each text."""
    return {"pixel_values": Noise((batch, count, 3, size, size))}


def pair(stem: str, kind: str, inputs: Mapping[str, Spec], config: Mapping[str, Any], **others: Any) -> tuple[Row, Row]:
    """The rows of a decoder without and with its word head: ``stem`` is what the two class names share."""
    return (
        Row(f"{stem}Model", kind, inputs, config, **others),
        Row(f"{stem}ForConditionalGeneration", kind, inputs, config, **others),
    )
