"""A small vision-language model with BLIP's wiring: one text transformer that reads the image in every layer.

B is the batch, T the image tokens (64 patches and one class token), L the text tokens, D the width, E the embedding, V the
vocabulary. Wiring after "BLIP: Bootstrapping Language-Image Pre-training" (ICML 2022): a unimodal text encoder, an
image-grounded text encoder and an image-grounded text decoder that share all weights but those of self-attention, in
which the decoder has its own. The vision stack is that of the sister example; all sizes are for one CPU core.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from emoji_xvlm.modeling import Attention, MlmHead, Mlp, StackConfig, VisionEncoder, initialise, key_mask
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig(StackConfig):
    """Sizes of the model; ``vocab_size`` counts the tokenizer's tokens, the two prompts come on top."""

    text_layers: int = 4

    @property
    def encode_id(self) -> int:
        """Token [ENC] in front of a sentence that the image-grounded encoder reads."""
        return self.vocab_size

    @property
    def decode_id(self) -> int:
        """Token [DEC] in front of a sentence that the decoder writes."""
        return self.vocab_size + 1


class TextBlock(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention into the image, MLP.

    A block that is tied to another has its own self-attention and the other's cross-attention and MLP, as one object.
    """

    def __init__(self, config: ModelConfig, tied_to: "TextBlock | None" = None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.cross_norm: nn.LayerNorm = tied_to.cross_norm if tied_to else nn.LayerNorm(config.width)
        self.cross_attention: Attention = tied_to.cross_attention if tied_to else Attention(config.width, config.heads)
        self.mlp_norm: nn.LayerNorm = tied_to.mlp_norm if tied_to else nn.LayerNorm(config.width)
        self.mlp: Mlp = tied_to.mlp if tied_to else Mlp(config.width, config.mlp_width)

    def forward(self, states: Tensor, mask: Tensor, image_states: Tensor | None = None) -> Tensor:
        """(B, L, D) text states to (B, L, D).

        Args:
            states: (B, L, D).
            mask: (B, 1, 1 or L, L) bool, True where a token may be read.
            image_states: (B, T, D); None leaves the cross-attention out.
        """
        normed = self.attention_norm(states)
        states = states + self.attention(normed, normed, mask)
        if image_states is not None:
            states = states + self.cross_attention(self.cross_norm(states), image_states)
        output: Tensor = states + self.mlp(self.mlp_norm(states))
        return output


class TextTransformer(nn.Module):
    """Token and position embeddings, blocks, a norm; tied to another in everything but self-attention, if one is given."""

    def __init__(self, config: ModelConfig, tied_to: "TextTransformer | None" = None) -> None:
        super().__init__()
        if tied_to is None:
            self.token_embed = nn.Embedding(config.vocab_size + 2, config.width, padding_idx=0)
            self.position_embed = nn.Parameter(torch.zeros(1, config.max_text_length, config.width))
            self.layers = nn.ModuleList(TextBlock(config) for _ in range(config.text_layers))
            self.norm = nn.LayerNorm(config.width)
        else:
            self.token_embed = tied_to.token_embed
            self.position_embed = tied_to.position_embed
            self.layers = nn.ModuleList(TextBlock(config, other) for other in tied_to.layers if isinstance(other, TextBlock))
            self.norm = tied_to.norm

    def forward(self, input_ids: Tensor, mask: Tensor, image_states: Tensor | None = None) -> Tensor:
        """(B, L) ids, a mask and image states as in `TextBlock` to (B, L, D) states."""
        states = self.token_embed(input_ids) + self.position_embed[:, : input_ids.shape[1]]
        for layer in self.layers:
            states = layer(states, mask, image_states)
        output: Tensor = self.norm(states)
        return output


class EmojiBlip(nn.Module):
    """Vision stack and tied text encoder and decoder, with contrastive, matching and next-word heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = VisionEncoder(config)
        self.text_encoder = TextTransformer(config)
        self.text_decoder = TextTransformer(config, tied_to=self.text_encoder)
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07), as CLIP
        self.itm_head = nn.Linear(config.width, 2)
        self.lm_head = MlmHead(config)
        self.apply(initialise)
        nn.init.trunc_normal_(self.vision_encoder.position_embed, std=0.02)
        nn.init.trunc_normal_(self.vision_encoder.cls_token, std=0.02)
        nn.init.trunc_normal_(self.text_encoder.position_embed, std=0.02)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, 64, 64) to (B, T, D)."""
        states: Tensor = self.vision_encoder(pixel_values)
        return states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unimodal: (B, L) ids and padding mask to (B, L, D)."""
        states: Tensor = self.text_encoder(input_ids, key_mask(attention_mask))
        return states

    def fuse(self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> Tensor:
        """Image-grounded: (B, L) ids and padding mask and (B, T, D) image states to (B, L, D); [ENC] becomes token 0."""
        prompted = with_prompt(input_ids, self.config.encode_id)
        states: Tensor = self.text_encoder(prompted, key_mask(attention_mask), image_states)
        return states

    def decode(self, input_ids: Tensor, attention_mask: Tensor, image_states: Tensor) -> Tensor:
        """Causal and image-grounded: (B, L) ids and padding mask and (B, T, D) to (B, L, V); [DEC] becomes token 0.

        Position i scores token i + 1 and reads none behind itself.
        """
        prompted = with_prompt(input_ids, self.config.decode_id)
        logits: Tensor = self.lm_head(self.text_decoder(prompted, causal_mask(attention_mask), image_states))
        return logits

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
            input_ids: (B, L) int64, [CLS] first, L at most ``config.max_text_length``.
            attention_mask: (B, L) int64, 1 = a token, 0 = padding on the right.

        Returns:
            image_embeds: (B, E) unit vectors.
            text_embeds: (B, E) unit vectors.
            itm_logits: (B, 2), column 1 says that the pair matches.
            lm_logits: (B, L, V), position i scores token i + 1 of the sentence.
        """
        image_states = self.encode_image(pixel_values)
        text_states = self.encode_text(input_ids, attention_mask)
        fused = self.fuse(input_ids, attention_mask, image_states)
        return {
            "image_embeds": self.embed_image(image_states[:, 0]),
            "text_embeds": self.embed_text(text_states[:, 0]),
            "itm_logits": self.itm_head(fused[:, 0]),
            "lm_logits": self.decode(input_ids, attention_mask, image_states),
        }


def causal_mask(attention_mask: Tensor) -> Tensor:
    """(B, L) padding mask to the (B, 1, L, L) bool mask of a decoder; padding must be on the right."""
    length = attention_mask.shape[1]
    is_past = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return key_mask(attention_mask) & is_past


def with_prompt(input_ids: Tensor, token_id: int) -> Tensor:
    """(B, L) ids with another token 0."""
    return torch.cat([torch.full_like(input_ids[:, :1], token_id), input_ids[:, 1:]], dim=1)
