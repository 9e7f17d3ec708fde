"""The pre-training loss of X-VLM on the small model of the oracle: image-text contrastive, matching, and masked language.

"Multi-Grained Vision Language Pre-Training" (Zeng et al., ICML 2022), equations 2 to 5. Matching draws one hard negative for
every image and every text from torch's global generator, by similarity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.xvlm import Xvlm, key_bias

Batch = dict[str, Tensor]


def loss(module: nn.Module, batches: tuple[Batch, ...]) -> Tensor:
    """The mean of the losses of a general and a region batch."""
    assert isinstance(module, Xvlm)
    with torch.no_grad():
        module.temp.clamp_(0.001, 0.5)
    losses = [loss_of_one(module, batch) for batch in batches]
    return torch.stack(losses).mean()


def loss_of_one(module: Xvlm, batch: Batch) -> Tensor:
    """ITC + ITM + MLM of one batch.

    Args:
        module: the model.
        batch: image, text_ids, text_atts, ids_masked (B, L), masked_pos and masked_ids (B, M); with regions also
            idx_to_group_img (B,) and image_atts (B, T).
    """
    image = module.vision_encoder(batch["image"], batch.get("idx_to_group_img"), batch.get("image_atts"))
    image_atts = batch.get("image_atts", torch.ones(image.shape[:2], dtype=torch.long))
    text_atts = batch["text_atts"]
    text = encode_text(module, batch["text_ids"], text_atts)
    image_feature = F.normalize(module.vision_proj(image[:, 0]), dim=-1)
    text_feature = F.normalize(module.text_proj(text[:, 0]), dim=-1)
    similarity = image_feature @ text_feature.T / module.temp
    pairs = torch.arange(len(text))
    contrastive = (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2

    negative_image, negative_text = hard_negatives(similarity.detach())
    fused = [
        fuse(module, text, text_atts, image, image_atts)[:, 0],
        fuse(module, text, text_atts, image[negative_image], image_atts[negative_image])[:, 0],
        fuse(module, text[negative_text], text_atts[negative_text], image, image_atts)[:, 0],
    ]
    labels = torch.cat([torch.ones(len(text), dtype=torch.long), torch.zeros(2 * len(text), dtype=torch.long)])
    matching = F.cross_entropy(module.itm_head(torch.cat(fused)), labels)

    states = fuse(module, encode_text(module, batch["ids_masked"], text_atts), text_atts, image, image_atts)
    places = batch["masked_pos"].unsqueeze(-1).expand(-1, -1, states.shape[-1])
    logits = predict_words(module, states.gather(1, places))
    masked = F.cross_entropy(logits.flatten(0, 1), batch["masked_ids"].flatten(), ignore_index=-100)
    total: Tensor = contrastive + matching + masked
    return total


def hard_negatives(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """For every text an image that is not its own, then for every image such a text; (B,) each."""
    of_images = (similarity.T.softmax(dim=1) + 1e-5).fill_diagonal_(0)
    of_texts = (similarity.softmax(dim=1) + 1e-5).fill_diagonal_(0)
    drawn = [torch.stack([torch.multinomial(row, 1)[0] for row in weights]) for weights in (of_images, of_texts)]
    return drawn[0], drawn[1]


def encode_text(module: Xvlm, ids: Tensor, atts: Tensor) -> Tensor:
    """The text layers: (B, L) to (B, L, D)."""
    bert = module.text_encoder.bert
    states: Tensor = bert.embeddings(ids, None)
    for layer in bert.encoder.layer[: bert.encoder.fusion_layer]:
        states = layer(states, key_bias(atts), None, None)
    return states


def fuse(module: Xvlm, text: Tensor, text_atts: Tensor, image: Tensor, image_atts: Tensor) -> Tensor:
    """The fusion layers: (B, L, D) and (B, T, V) to (B, L, D)."""
    encoder = module.text_encoder.bert.encoder
    for layer in encoder.layer[encoder.fusion_layer :]:
        text = layer(text, key_bias(text_atts), image, key_bias(image_atts))
    return text


def predict_words(module: Xvlm, states: Tensor) -> Tensor:
    """(B, M, D) to logits (B, M, vocabulary)."""
    head = module.text_encoder.cls.predictions
    logits: Tensor = head.decoder(head.transform.LayerNorm(F.gelu(head.transform.dense(states))))
    return logits
