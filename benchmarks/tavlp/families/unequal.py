"""The XVLM-like family with stacks of unequal size: the same function as the XVLM-like model, in weights of another scale.

Eq. 7 of MULTIFLOW asks how large the weights of each modality are. Stacks that were drawn alike and trained together are of
one size, so that the question cannot arise; the paper's come from checkpoints of their own. A transformer with norms in
front of its layers has a symmetry that makes the difference without any training: if the states that run through a stack
are all larger by a factor, its norms take the factor out again.
"""

from __future__ import annotations

import torch
from emoji_xvlm.modeling import EmojiXvlm, EncoderBlock, TextEncoder

from benchmarks.tavlp.families.xvlm import XvlmFamily

FACTOR = 2.0
"""A power of two: products with it are exact."""


@torch.no_grad()
def enlarge(stack: TextEncoder, factor: float) -> None:
    """Multiply all matrices of a text stack, in place; what it computes stays.

    Layers behind a norm grow while the norm shrinks; embeddings and layers that write into the states make these larger,
    which the next norm undoes, its epsilon included.
    """
    stack.norm.eps *= factor**2
    stack.token_embed.weight.mul_(factor)
    stack.position_embed.mul_(factor)
    for layer in stack.layers:
        assert isinstance(layer, EncoderBlock)
        attention, mlp = layer.attention, layer.mlp
        for reader in (attention.query, attention.key, attention.value, mlp.fc1):
            reader.weight.mul_(factor)
        for norm in (layer.attention_norm, layer.mlp_norm):
            norm.weight.div_(factor)
            norm.bias.div_(factor)
            norm.eps *= factor**2
        for writer in (attention.out, mlp.fc2):
            for parameter in writer.parameters():
                parameter.mul_(factor)


class UnequalXvlmFamily(XvlmFamily):
    """See `benchmarks.tavlp.families.contract.Family`."""

    name = f"xvlm-text-x{FACTOR:g}"

    def build(self) -> EmojiXvlm:
        model = super().build()
        enlarge(model.text_encoder, FACTOR)
        return model


UNEQUAL_XVLM = UnequalXvlmFamily()
