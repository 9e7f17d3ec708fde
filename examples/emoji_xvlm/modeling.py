"""A small vision-language model with XVLM's wiring: separate vision, text and fusion stacks.

B is the batch, T the image tokens (64 patches and one class token), L the text tokens, D the width, V the vocabulary.
Wiring after "Multi-Grained Vision Language Pre-Training" (X-VLM, ICML 2022); all sizes are for two CPU cores.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class StackConfig:
    """Sizes of the vision and text stacks."""

    vocab_size: int
    width: int = 192
    heads: int = 6
    mlp_width: int = 768
    vision_layers: int = 6
    text_layers: int = 3
    embed_dim: int = 128
    image_px: int = 64
    patch_px: int = 8
    max_text_length: int = 40

    @property
    def patches_a_side(self) -> int:
        """Patches along one edge of the image."""
        return self.image_px // self.patch_px


@dataclass(frozen=True)
class ModelConfig(StackConfig):
    """Sizes of the whole model."""

    fusion_layers: int = 3


class Attention(nn.Module):
    """Multi-head attention of ``states`` over ``context``; self-attention where both are the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, states: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            states: (B, Q, D).
            context: (B, K, D).
            mask: (B, 1, 1, K) bool, True where a key may be read; None reads all.

        Returns:
            (B, Q, D).
        """
        query = self.query(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key = self.key(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.value(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, states: Tensor) -> Tensor:
        """(B, Q, D) to (B, Q, D)."""
        output: Tensor = self.fc2(F.gelu(self.fc1(states)))
        return output


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: self-attention, MLP."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Q, D) to (B, Q, D); ``mask`` as in `Attention`."""
        normed = self.attention_norm(states)
        states = states + self.attention(normed, normed, mask)
        output: Tensor = states + self.mlp(self.mlp_norm(states))
        return output


class FusionBlock(nn.Module):
    """Pre-norm transformer block over text: self-attention, cross-attention into the image, MLP."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.cross_norm = nn.LayerNorm(config.width)
        self.cross_attention = Attention(config.width, config.heads)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = Mlp(config.width, config.mlp_width)

    def forward(self, states: Tensor, image_states: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D) text states and (B, T, D) image states to (B, L, D) text states."""
        normed = self.attention_norm(states)
        states = states + self.attention(normed, normed, mask)
        states = states + self.cross_attention(self.cross_norm(states), image_states)
        output: Tensor = states + self.mlp(self.mlp_norm(states))
        return output


class VisionEncoder(nn.Module):
    """ViT over 8x8 patches with a class token in front."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        tokens = config.patches_a_side**2 + 1
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position_embed = nn.Parameter(torch.zeros(1, tokens, config.width))
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.vision_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, 64, 64) images to (B, T, D) states, the class token first."""
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        states = torch.cat([cls, patches], dim=1) + self.position_embed
        for layer in self.layers:
            states = layer(states)
        output: Tensor = self.norm(states)
        return output


class TextEncoder(nn.Module):
    """Bidirectional transformer over token ids."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.position_embed = nn.Parameter(torch.zeros(1, config.max_text_length, config.width))
        self.layers = nn.ModuleList(EncoderBlock(config) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and (B, 1, 1, L) bool mask to (B, L, D) states."""
        states = self.token_embed(input_ids) + self.position_embed[:, : input_ids.shape[1]]
        for layer in self.layers:
            states = layer(states, mask)
        output: Tensor = self.norm(states)
        return output


class FusionEncoder(nn.Module):
    """Text states that read the image by cross-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FusionBlock(config) for _ in range(config.fusion_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, text_states: Tensor, image_states: Tensor, mask: Tensor) -> Tensor:
        """(B, L, D), (B, T, D) and (B, 1, 1, L) bool to (B, L, D)."""
        for layer in self.layers:
            text_states = layer(text_states, image_states, mask)
        output: Tensor = self.norm(text_states)
        return output


class MlmHead(nn.Module):
    """Scores every word of the vocabulary at every position."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.decoder = nn.Linear(config.width, config.vocab_size)

    def forward(self, states: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.dense(states))))
        return logits


class EmojiXvlm(nn.Module):
    """Vision, text and fusion stacks with contrastive, matching and masked-word heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.fusion_encoder = FusionEncoder(config)
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as CLIP
        self.itm_head = nn.Linear(config.width, 2)
        self.mlm_head = MlmHead(config)
        self.apply(initialise)
        nn.init.trunc_normal_(self.vision_encoder.position_embed, std=0.02)
        nn.init.trunc_normal_(self.vision_encoder.cls_token, std=0.02)
        nn.init.trunc_normal_(self.text_encoder.position_embed, std=0.02)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, 64, 64) to (B, T, D)."""
        states: Tensor = self.vision_encoder(pixel_values)
        return states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and padding mask to (B, L, D)."""
        states: Tensor = self.text_encoder(input_ids, key_mask(attention_mask))
        return states

    def fuse(self, text_states: Tensor, image_states: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, D), (B, T, D) and the (B, L) padding mask to (B, L, D)."""
        states: Tensor = self.fusion_encoder(text_states, image_states, key_mask(attention_mask))
        return states

    def embed_image(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., E) unit vectors."""
        return F.normalize(self.vision_proj(states), dim=-1)

    def embed_text(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., E) unit vectors."""
        return F.normalize(self.text_proj(states), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Score B pairs of one image and one sentence.

        Args:
            pixel_values: (B, 3, 64, 64) float, -1 to 1.
            input_ids: (B, L) int64, L at most ``config.max_text_length``.
            attention_mask: (B, L) int64, 1 = a token, 0 = padding.

        Returns:
            image_embeds: (B, E) unit vectors.
            text_embeds: (B, E) unit vectors.
            itm_logits: (B, 2), column 1 says that the pair matches.
            mlm_logits: (B, L, V).
        """
        image_states = self.encode_image(pixel_values)
        text_states = self.encode_text(input_ids, attention_mask)
        fused = self.fuse(text_states, image_states, attention_mask)
        return {
            "image_embeds": self.embed_image(image_states[:, 0]),
            "text_embeds": self.embed_text(text_states[:, 0]),
            "itm_logits": self.itm_head(fused[:, 0]),
            "mlm_logits": self.mlm_head(fused),
        }


def key_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) padding mask to the (B, 1, 1, L) bool mask that attention reads."""
    return attention_mask.to(torch.bool)[:, None, None, :]


def initialise(module: nn.Module) -> None:
    """Truncated normal weights of deviation 0.02, zero biases; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
