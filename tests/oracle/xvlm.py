"""A small XVLM as plain modules: the model that the oracle's masks were computed on.

Wiring after "Multi-Grained Vision Language Pre-Training" (X-VLM, ICML 2022) with a CLIP vision tower and a BERT text
tower; parameter names are those of the recorded weights, and ``test_xvlm.py`` compares activations with the recording.

B is the batch of texts, I the images, T the image tokens (class token first), L the text tokens, V and D the widths of
vision and text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -10000.0  # added to a logit that may not be attended; exp() of it is 0 in fp32


@dataclass(frozen=True)
class XvlmConfig:
    """Sizes; the field names are the keys of the oracle's config.json."""

    image_res: int
    patch: int
    vision_width: int
    vision_heads: int
    vision_inter: int
    vision_layers: int
    local_attn_depth: int
    text_hidden: int
    text_heads: int
    text_inter: int
    text_layers: int
    fusion_layer: int
    vocab: int
    maxpos: int
    embed_dim: int


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Multi-head attention: (B, Q, D), (B, K, D), (B, K, D) and a bias (B, K) on the keys to (B, Q, D)."""
    (rows, length, width), keys = query.shape, key.shape[1]
    query = query.view(rows, length, heads, width // heads).transpose(1, 2)
    key = key.view(rows, keys, heads, width // heads).transpose(1, 2)
    value = value.view(rows, keys, heads, width // heads).transpose(1, 2)
    logits = query @ key.transpose(-1, -2) / (width // heads) ** 0.5
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    mixed: Tensor = logits.softmax(-1) @ value
    return mixed.transpose(1, 2).flatten(2)


def key_bias(mask: Tensor) -> Tensor:
    """(B, K) of 1 = may be attended to a bias on the logits."""
    return (1.0 - mask.float()) * MASKED


class VisionAttention(nn.Module):
    """Self-attention of image tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        mixed = attend(self.q_proj(states), self.k_proj(states), self.v_proj(states), self.heads, bias)
        output: Tensor = self.out_proj(mixed)
        return output


class VisionMlp(nn.Module):
    """Two linear layers with CLIP's sigmoid approximation of GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.fc1(states)
        output: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return output


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.self_attn = VisionAttention(config.vision_width, config.vision_heads)
        self.layer_norm1 = nn.LayerNorm(config.vision_width)
        self.mlp = VisionMlp(config.vision_width, config.vision_inter)
        self.layer_norm2 = nn.LayerNorm(config.vision_width)

    def forward(self, states: Tensor, bias: Tensor | None) -> Tensor:
        states = states + self.self_attn(self.layer_norm1(states), bias)
        output: Tensor = states + self.mlp(self.layer_norm2(states))
        return output


class VisionStack(nn.Module):
    """The layers; the last ``local_attn_depth`` of them see a region-masked copy of the image for every text."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_layers))
        self.first_local = config.vision_layers - config.local_attn_depth

    def forward(self, states: Tensor, image_of_text: Tensor | None, image_atts: Tensor | None) -> Tensor:
        """(I, T, V) to (I, T, V), or to (B, T, V), the region-masked copies, where regions are given."""
        bias = None
        for index, layer in enumerate(self.layers):
            if index == self.first_local and image_of_text is not None and image_atts is not None:
                everything = torch.ones(states.shape[:2], dtype=image_atts.dtype)
                bias = key_bias(torch.cat([image_atts, everything]))
                states = torch.cat([states[image_of_text], states])
            states = layer(states, bias)
        return states if image_of_text is None else states[: image_of_text.shape[0]]


class VisionEncoder(nn.Module):
    """Patches, class token and positions; norm; layers; norm."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        tokens = (config.image_res // config.patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(config.vision_width))
        self.patch_embed = nn.Conv2d(3, config.vision_width, config.patch, config.patch, bias=False)
        self.pos_embed = nn.Embedding(tokens, config.vision_width)
        self.register_buffer("position_ids", torch.arange(tokens)[None])
        self.position_ids: Tensor
        self.pre_layrnorm = nn.LayerNorm(config.vision_width)
        self.encoder = VisionStack(config)
        self.post_layernorm = nn.LayerNorm(config.vision_width)

    def forward(self, image: Tensor, image_of_text: Tensor | None, image_atts: Tensor | None) -> Tensor:
        """(I, 3, H, W) to (I, T, V), or to (B, T, V) where regions are given."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(image.shape[0], 1, -1), patches], dim=1)
        states = self.pre_layrnorm(tokens + self.pos_embed(self.position_ids))
        output: Tensor = self.post_layernorm(self.encoder(states, image_of_text, image_atts))
        return output


class ProjectAddNorm(nn.Module):
    """Linear, residual, LayerNorm."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        output: Tensor = self.LayerNorm(self.dense(hidden) + residual)
        return output


class Projections(nn.Module):
    """Queries of the text; keys and values of a context of its own width."""

    def __init__(self, width: int, context_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)


class TextAttention(nn.Module):
    """Attention of text tokens over a context, with residual and norm after it."""

    def __init__(self, width: int, context_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = Projections(width, context_width)
        self.output = ProjectAddNorm(width, width)

    def forward(self, states: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = self.self.query(states), self.self.key(context), self.self.value(context)
        output: Tensor = self.output(attend(query, key, value, self.heads, bias), states)
        return output


class Intermediate(nn.Module):
    """Linear and GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, states: Tensor) -> Tensor:
        return F.gelu(self.dense(states))


class TextLayer(nn.Module):
    """Post-norm transformer layer; a fusion layer attends to the image between its self-attention and its MLP."""

    def __init__(self, config: XvlmConfig, *, is_fusion: bool) -> None:
        super().__init__()
        width, heads = config.text_hidden, config.text_heads
        self.attention = TextAttention(width, width, heads)
        if is_fusion:
            self.crossattention = TextAttention(width, config.vision_width, heads)
        self.intermediate = Intermediate(width, config.text_inter)
        self.output = ProjectAddNorm(config.text_inter, width)

    def forward(self, states: Tensor, bias: Tensor, image: Tensor | None, image_bias: Tensor | None) -> Tensor:
        states = self.attention(states, states, bias)
        if image is not None:
            states = self.crossattention(states, image, image_bias)
        output: Tensor = self.output(self.intermediate(states), states)
        return output


class TextEmbeddings(nn.Module):
    """Word, position and (always the first) token type; norm."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab, config.text_hidden)
        self.position_embeddings = nn.Embedding(config.maxpos, config.text_hidden)
        self.token_type_embeddings = nn.Embedding(2, config.text_hidden)
        self.LayerNorm = nn.LayerNorm(config.text_hidden, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(config.maxpos)[None])
        self.position_ids: Tensor

    def forward(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            positions = self.position_ids[:, : ids.shape[1]]
        types = self.token_type_embeddings(torch.zeros_like(ids))
        output: Tensor = self.LayerNorm(self.word_embeddings(ids) + types + self.position_embeddings(positions))
        return output


class TextStack(nn.Module):
    """Text layers first, then ``fusion_layer`` and all later ones are fusion layers."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.layer = nn.ModuleList(
            TextLayer(config, is_fusion=index >= config.fusion_layer) for index in range(config.text_layers)
        )

    def forward(self, states: Tensor, bias: Tensor, image: Tensor, image_bias: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.layer):
            states = layer(states, bias, image if index >= self.fusion_layer else None, image_bias)
        return states


class Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextStack(config)


class PredictionTransform(nn.Module):
    """Linear and norm of the masked-language head; not part of the forward pass here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)


class Predictions(nn.Module):
    """Masked-language head; its output weights are the word embeddings."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config.text_hidden)
        self.decoder = nn.Linear(config.text_hidden, config.vocab)


class LanguageHead(nn.Module):
    """Holds the predictions under the name that the weights use."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)


class TextEncoder(nn.Module):
    """The text tower and its language head."""

    def __init__(self, config: XvlmConfig) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.cls = LanguageHead(config)


def head(width: int, outputs: int) -> nn.Sequential:
    """A two-layer head."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, outputs))


class Xvlm(nn.Module):
    """Vision, text and fusion stacks, and the heads of pre-training, which ``forward`` does not run.

    Args:
        config: sizes.
        positions_from_mask: number the text positions by ``text_atts``, so that padding may stand on the left.
    """

    def __init__(self, config: XvlmConfig, *, positions_from_mask: bool = False) -> None:
        super().__init__()
        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
        self.text_proj = nn.Linear(config.text_hidden, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))
        self.itm_head = head(config.text_hidden, 2)
        self.bbox_head = head(config.text_hidden, 4)
        self.positions_from_mask = positions_from_mask
        self.text_encoder.cls.predictions.decoder.weight = self.text_encoder.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_atts: Tensor,
        idx_to_group_img: Tensor | None = None,
        image_atts: Tensor | None = None,
    ) -> Tensor:
        """Fused states of the text.

        Args:
            image: (I, 3, H, W).
            text_ids: (B, L) token ids; B = I without regions.
            text_atts: (B, L), 1 = token, 0 = padding.
            idx_to_group_img: (B,) the image of each text; with regions only.
            image_atts: (B, T), 1 = the image token is inside the region of the text; with regions only.

        Returns:
            (B, L, D).
        """
        image_states = self.vision_encoder(image, idx_to_group_img, image_atts)
        positions = (text_atts.cumsum(1) - 1).clamp(min=0) if self.positions_from_mask else None
        states = self.text_encoder.bert.embeddings(text_ids, positions)
        image_bias = None if image_atts is None else key_bias(image_atts)
        output: Tensor = self.text_encoder.bert.encoder(states, key_bias(text_atts), image_states, image_bias)
        return output
