"""Which multimodal classes of the installed transformers have a row, told by what their forward takes.

python -m benchmarks.zoo.coverage
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel, logging
from transformers.backbone_utils import BackboneMixin

from benchmarks.zoo.row import Row
from benchmarks.zoo.table import all_rows

logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # looking at every name makes image processors complain

TEXT = re.compile(r"(^|_)input(_text)?_ids$|^(task|text)_inputs$")
"""Arguments of forward that hold token ids. Embeddings in their place (``inputs_embeds``) come with one of these."""

MEDIA = re.compile(
    r"(^|_)(pixel_values|input_features|input_values|audio_features|audio_mel|spectrogram)(_\w+)?$"
    r"|^(image|flattened|pixel)_patches$|^image$|^visual_(feats|embeds)$"
)
"""Arguments of forward that hold an image, a video or audio, or what a detector cut out of one."""

CONTROL = re.compile(r"(mask|lengths?|cutoffs|grid_thw|sizes|labels)$")
"""``input_features_mask`` is no audio."""

EXEMPT: Mapping[str, str] = {
    "layoutlmv2": "its page is read by detectron2, which no package registry holds for this version of torch",
}
"""``model_type`` -> why the architecture has no row."""


@dataclass(frozen=True)
class MultimodalClass:
    """A class that takes text together with something to see or to hear.

    Attributes:
        name: in ``transformers``.
        architecture: ``model_type`` of its configuration.
        text: arguments of forward that take tokens.
        media: arguments of forward that take images, videos or audio.
    """

    name: str
    architecture: str
    text: tuple[str, ...]
    media: tuple[str, ...]


def multimodal_classes() -> tuple[MultimodalClass, ...]:
    """Every class that transformers exports and that takes text together with an image, a video or audio."""
    found = []
    for name in sorted(dir(transformers)):
        exported: Any = getattr(transformers, name, None)
        if not (inspect.isclass(exported) and issubclass(exported, PreTrainedModel)) or not _is_concrete(exported):
            continue
        arguments = [item for item in inspect.signature(exported.forward).parameters if not CONTROL.search(item)]
        text = tuple(item for item in arguments if TEXT.search(item))
        media = tuple(item for item in arguments if MEDIA.search(item))
        if text and media:
            configuration: Any = exported.config_class
            found.append(MultimodalClass(name, configuration.model_type, text, media))
    return tuple(found)


def _is_concrete(model: type[PreTrainedModel]) -> bool:
    """Not a base class, which runs nothing; not a backbone, which gives feature maps to another model."""
    runs = model.forward is not nn.Module.forward
    return runs and model.config_class is not None and not issubclass(model, BackboneMixin)


def missing_classes(rows: Mapping[str, Row]) -> tuple[MultimodalClass, ...]:
    """The multimodal classes without a row; a second name for a class with one has its forward, and is not missed."""
    forwards = {getattr(transformers, row.name).forward for row in rows.values()}
    return tuple(item for item in multimodal_classes() if getattr(transformers, item.name).forward not in forwards)


def missing_architectures(rows: Mapping[str, Row]) -> tuple[str, ...]:
    """``model_type`` of every multimodal architecture of which no class has a row."""
    covered = {getattr(transformers, row.name).config_class.model_type for row in rows.values()}
    return tuple(sorted({item.architecture for item in multimodal_classes()} - covered))


def main() -> None:
    """Print the classes without a row, by architecture."""
    rows = all_rows()
    classes, missing, bare = multimodal_classes(), missing_classes(rows), missing_architectures(rows)
    for item in sorted(missing, key=lambda item: (item.architecture not in bare, item.architecture, item.name)):
        without = " (no row at all)" if item.architecture in bare else ""
        reason = f": {EXEMPT[item.architecture]}" if item.architecture in EXEMPT else ""
        print(f"{item.architecture}{without}{reason}  {item.name}({', '.join((*item.text, *item.media))})")
    architectures = {item.architecture for item in classes}
    print(
        f"{len(classes) - len(missing)} of {len(classes)} classes and {len(architectures) - len(bare)} of {len(architectures)} "
        f"architectures have a row"
    )


if __name__ == "__main__":
    main()
