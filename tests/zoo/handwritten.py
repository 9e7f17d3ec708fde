"""The table of hand-written models: how each is built and called, and what must be found in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import odd_styles, one_stream, two_towers

BATCH = 3
HEAD = "outside any repeated block"


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        build: makes the model.
        inputs: text length -> example inputs.
        regions: glob over weight names -> region; the last that matches holds, and every linear weight matches one.
        dense: glob -> part of the reason why these weights are not pruned; all others are.
        shared: globs of the weights that are called with different modalities.
        modalities: input name -> modality, where the model's author would have to say.
        text: names of (token input, mask input) that padding is appended to, and where the mask is 1 at padding.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    regions: Mapping[str, str]
    dense: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    modalities: Mapping[str, str] = field(default_factory=dict)
    text: tuple[tuple[str, str], ...] = ()

    def make(self) -> nn.Module:
        """The model with weights that are the same every time."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model


def picture() -> Tensor:
    return torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ids(length: int = 6, rows: int = 48, seed: int = 2) -> Tensor:
    found = torch.randint(2, rows, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    return torch.where(mask(length) != 0, found, 0)


def mask(length: int = 6) -> Tensor:
    lengths = torch.tensor([length, length - 2, length - 3])
    return (torch.arange(length)[None] < lengths[:, None]).long()


def placeholders(length: int) -> Tensor:
    """Text with four places for image tokens."""
    found = ids(length)
    found[:, :4] = 49
    return found


CASES: dict[str, Case] = {
    "attribute blocks": Case(
        two_towers.AttributeBlocks,
        lambda n: {"a": picture(), "b": ids(n), "c": mask(n)},
        {"see_*": "vision", "read_*": "text", "join_*": "fusion", "head.weight": "fusion"},
        {"head.weight": HEAD},
        text=(("b", "c"),),
    ),
    "lists of lists": Case(
        two_towers.ListsOfLists,
        lambda n: (picture(), ids(n)),
        {"patches.*": "vision", "vision.*": "vision", "text.*": "text", "multi.*": "fusion", "to_logits.*": "fusion"},
        {"patches.*": HEAD, "to_logits.*": HEAD},
    ),
    "torch layers": Case(
        two_towers.TorchLayers,
        lambda n: {"image": picture(), "ids": ids(n), "mask": mask(n)},
        {"image_encoder.*": "vision", "text_encoder.*": "text", "decoder.*": "fusion", "head.*": "fusion"},
        {"head.*": HEAD},
        text=(("ids", "mask"),),
    ),
    "torch attention": Case(
        two_towers.TorchAttention,
        lambda n: {"pixels": picture(), "tokens": ids(n), "padding_mask": mask(n) == 0},
        {"vision.*": "vision", "text.*": "text", "fusion.*": "fusion"},
        text=(("tokens", "padding_mask"),),
    ),
    "raw parameters": Case(
        two_towers.RawParameters,
        lambda n: (picture(), ids(n)),
        {"patches.*": "vision", "v.*": "vision", "t.*": "text", "x.*": "fusion", "final": "fusion"},
        {"patches.*": HEAD, "final": HEAD},
    ),
    "shared text encoder": Case(
        two_towers.SharedTextEncoder,
        lambda n: {"image": picture(), "text_ids": ids(n), "text_atts": mask(n)},
        {"vision.*": "vision", "layers.*": "fusion", "image_proj.*": "vision", "text_proj.*": "text", "match.*": "fusion"},
        {"image_proj.*": HEAD, "text_proj.*": HEAD, "match.*": HEAD},
        # In the first layer self-attention reads text in both runs; the feed-forward reads what the image joined.
        shared=("layers.0.ff.*", "layers.1.attention.*", "layers.1.ff.*"),
        text=(("text_ids", "text_atts"),),
    ),
    "tied decoder": Case(
        two_towers.TiedDecoder,
        lambda n: {
            "image": picture(),
            "question": ids(n),
            "question_mask": mask(n),
            "answer": ids(5, seed=3),
            "answer_mask": mask(5),
        },
        {"vision.*": "vision", "encoder.*": "fusion", "decoder.*": "fusion", "words.table.weight": "fusion"},
        {"words.table.weight": "tied to an embedding table"},
        # The encoder's queries are text, the decoder's know the pooled question with the image in it.
        shared=("encoder.0.cross.q.*",),
        text=(("question", "question_mask"), ("answer", "answer_mask")),
    ),
    "single layers": Case(
        two_towers.SingleLayers,
        lambda n: (picture(), ids(n)),
        {"a.*": "vision", "b.*": "text", "c.*": "fusion", "projector.*": "vision"},
        {"projector.*": HEAD},
    ),
    "contrastive": Case(
        two_towers.Contrastive,
        lambda n: (picture(), ids(n)),
        {
            "embed.i.*": "vision",
            "towers.i.*": "vision",
            "towers.t.*": "text",
            "projectors.i.*": "vision",
            "projectors.t.*": "text",
        },
        {"embed.*": HEAD, "projectors.*": HEAD},
    ),
    "in place": Case(
        two_towers.InPlace,
        lambda n: {"image": picture(), "ids": ids(n), "keep": mask(n).float()},
        {"v.*": "vision", "t.*": "text", "f.*": "fusion", "text_head.*": "text", "joint_head.*": "fusion"},
        {"text_head.*": HEAD, "joint_head.*": HEAD},
        text=(("ids", "keep"),),
    ),
    "prefix by cat": Case(
        one_stream.PrefixByCat,
        lambda n: {"images": picture(), "input_ids": ids(n), "attention_mask": mask(n)},
        {"tower.*": "vision", "connector.*": "vision", "decoder.*": "fusion", "lm_head.*": "fusion"},
        {"connector.*": HEAD, "lm_head.*": HEAD},
        text=(("input_ids", "attention_mask"),),
    ),
    "prefix by scatter": Case(
        one_stream.PrefixByScatter,
        lambda n: {"picture": picture(), "ids": placeholders(n + 6), "mask": mask(n + 6)},
        {"tower.*": "vision", "connector.*": "vision", "decoder.*": "fusion"},
        {"connector.*": HEAD},
        text=(("ids", "mask"),),
    ),
    "single stream": Case(
        one_stream.SingleStream,
        lambda n: {"txt": ids(n), "txt_mask": mask(n).bool(), "img": picture()},
        {"to_patches.*": "vision", "blocks.*": "fusion", "pooler.*": "fusion"},
        {"to_patches.*": HEAD, "pooler.*": HEAD},
        text=(("txt", "txt_mask"),),
    ),
    "written sequence": Case(
        one_stream.WrittenSequence,
        lambda n: {"image": picture(), "ids": ids(n), "mask": mask(n)},
        {"layers.*": "fusion"},
        text=(("ids", "mask"),),
    ),
    "learned queries": Case(
        one_stream.Queries,
        lambda n: {"pixel_values": picture(), "input_ids": ids(n)},
        {"tower.*": "vision", "former.*": "vision", "to_language.*": "vision", "language.*": "fusion"},
        {"to_language.*": HEAD},
    ),
    "co-attention": Case(
        one_stream.CoAttention,
        lambda n: {"image": picture(), "ids": ids(n), "mask": mask(n)},
        {"vision.*": "vision", "text.*": "text", "joint.*": "fusion"},
        shared=("joint.0.across.[qkv].*",),
        text=(("ids", "mask"),),
    ),
    "experts": Case(
        one_stream.Experts,
        lambda n: {"image": picture(), "ids": ids(n), "mask": mask(n)},
        {"vision.*": "vision", "layers.*": "fusion"},
        text=(("ids", "mask"),),
    ),
    "gated": Case(
        one_stream.Gated,
        lambda n: {"image": picture(), "ids": ids(n), "mask": mask(n)},
        {"resampler.*": "vision", "stack.0.*": "text", "stack.1.*": "fusion", "stack.2.*": "fusion"},
        text=(("ids", "mask"),),
    ),
    "late fusion": Case(
        one_stream.LateFusion,
        # As many words as patches: padding must not be looked for in image-fed keys and values.
        lambda n: {"image": picture(), "ids": ids(n - 2), "mask": mask(n - 2)},
        {"vision.*": "vision", "layer.0.*": "text", "layer.1.*": "text", "layer.2.*": "fusion"},
        text=(("ids", "mask"),),
    ),
    "nested": Case(
        one_stream.Nested,
        lambda n: {"x": {"feats": torch.randn(BATCH, 7, 10)}, "y": [ids(n), mask(n)]},
        {"lift.*": "vision", "one.*": "vision", "two.*": "text", "three.*": "fusion", "heads.*": "fusion"},
        {"lift.*": HEAD, "heads.*": HEAD},
        modalities={"batch.x.feats": "vision"},
        text=(("batch.y.0", "batch.y.1"),),
    ),
    "three texts": Case(
        one_stream.ThreeTexts,
        lambda n: {"p": picture(), "q": ids(n), "q_mask": mask(n), "r": ids(5, 20, 3), "r_mask": mask(5)},
        {"stages.*": "vision", "down.*": "vision", "encoder.*": "text", "decoder.*": "fusion"},
        {"down.*": HEAD},
        text=(("q", "q_mask"), ("r", "r_mask")),
    ),
    "recurrent": Case(
        odd_styles.Recurrent,
        lambda n: (picture(), ids(n)),
        {"see.*": "vision", "read.*": "text", "join.*": "fusion", "head.*": "fusion"},
        {"head.*": HEAD},
        # The first call of the fusion layer reads text, the second what the first has fused.
        shared=("join.self_attention.*", "join.cross_attention.q.*"),
    ),
    "multiway": Case(
        odd_styles.Multiway,
        lambda n: (picture(), ids(n)),
        {"layers.*": "fusion", "layers.*.ways.image.*": "vision", "layers.*.ways.text.*": "text"},
        shared=("layers.*.attention.*",),
    ),
    "by kind": Case(
        odd_styles.ByKind,
        lambda n: (picture(), ids(n)),
        {"mixers.*": "vision", "attentions.*": "text", "feed_forwards.*": "text", "layers.*": "fusion"},
    ),
    "reparametrized": Case(
        odd_styles.Reparametrized,
        lambda n: {"image": picture(), "ids": ids(n)},
        {"layers.*": "fusion"},
        {"layers.*.mixing.*": "changed by mul before"},
    ),
}
