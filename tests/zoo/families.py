"""Tiny random models of transformers' architectures, with inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Built = tuple[nn.Module, Inputs]

B, L = 2, 7
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 16,
    "patch_size": 8,
}


def image(size: int = 16) -> Tensor:
    return torch.rand(B, 3, size, size)


def ids(length: int = L) -> Tensor:
    return torch.randint(5, 90, (B, length))


def mask(length: int = L) -> Tensor:
    found = torch.ones(B, length, dtype=torch.long)
    found[1, -2:] = 0
    return found


def text() -> Inputs:
    return {"input_ids": ids() * mask(), "attention_mask": mask()}


def clip() -> Built:
    config = tr.CLIPConfig(text_config=dict(TEXT, eos_token_id=98), vision_config=dict(VISION), projection_dim=16)
    return tr.CLIPModel(config), {**text(), "pixel_values": image()}


def siglip() -> Built:
    config = tr.SiglipConfig(text_config=dict(TEXT), vision_config=dict(VISION))
    return tr.SiglipModel(config), {**text(), "pixel_values": image()}


def blip_config() -> Any:
    return tr.BlipConfig(
        text_config=dict(TEXT, encoder_hidden_size=32, bos_token_id=1, sep_token_id=2, projection_dim=32),
        vision_config=dict(VISION),
        projection_dim=32,
        image_text_hidden_size=16,
    )


def blip_itm() -> Built:
    return tr.BlipForImageTextRetrieval(blip_config()), {**text(), "pixel_values": image()}


def blip_cap() -> Built:
    return tr.BlipForConditionalGeneration(blip_config()), {**text(), "pixel_values": image()}


def blip_vqa() -> Built:
    return tr.BlipForQuestionAnswering(blip_config()), {
        **text(),
        "decoder_input_ids": ids(5),
        "decoder_attention_mask": mask(5),
        "pixel_values": image(),
    }


def qformer() -> dict[str, Any]:
    return {**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 2}


def opt() -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 37,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    }


def placeholders(count: int, token: int) -> Inputs:
    """Text with places for image tokens in front."""
    found, keep = ids(count + 6), mask(count + 6)
    found[:, :count] = token
    return {"input_ids": found * keep, "attention_mask": keep}


def blip2() -> Built:
    config = tr.Blip2Config(
        vision_config=dict(VISION), qformer_config=qformer(), text_config=opt(), num_query_tokens=4, image_token_index=4
    )
    return tr.Blip2ForConditionalGeneration(config), {**placeholders(4, 4), "pixel_values": image()}


def instructblip() -> Built:
    config = tr.InstructBlipConfig(
        vision_config=dict(VISION), qformer_config=qformer(), text_config=opt(), num_query_tokens=4, image_token_index=4
    )
    words = placeholders(4, 4)
    return tr.InstructBlipForConditionalGeneration(config), {
        "pixel_values": image(),
        **words,
        "qformer_input_ids": ids(5),
        "qformer_attention_mask": mask(5),
    }


def llama() -> dict[str, Any]:
    return dict(TEXT, model_type="llama", num_key_value_heads=4, pad_token_id=0)


def llava() -> Built:
    config = tr.LlavaConfig(
        text_config=llama(),
        vision_config=dict(VISION, model_type="clip_vision_model", projection_dim=32),
        image_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return tr.LlavaForConditionalGeneration(config), {**placeholders(4, 4), "pixel_values": image()}


def qwen2vl() -> Built:
    config = tr.Qwen2VLConfig(
        text_config=dict(
            TEXT,
            num_key_value_heads=2,
            rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        ),
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 4,
            "patch_size": 14,
            "mlp_ratio": 2,
            "hidden_size": 32,
            "spatial_merge_size": 1,
        },
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=1,
        vision_end_token_id=2,
    )
    words = placeholders(1, 3)
    return tr.Qwen2VLForConditionalGeneration(config), {
        **words,
        "pixel_values": torch.rand(B, 1176),
        "image_grid_thw": torch.tensor([[1, 1, 1]] * B),
        "mm_token_type_ids": (words["input_ids"] == 3).int(),
    }


def vilt() -> Built:
    config = tr.ViltConfig(**{**TEXT, "image_size": 16, "patch_size": 8, "num_labels": 3})
    return tr.ViltForQuestionAnswering(config), {
        **text(),
        "token_type_ids": torch.zeros(B, L, dtype=torch.long),
        "pixel_values": image(),
    }


def florence() -> Built:
    config = tr.Florence2Config(
        text_config={
            "model_type": "bart",
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        vision_config={
            "patch_size": [7],
            "patch_stride": [4],
            "patch_padding": [3],
            "patch_prenorm": [False],
            "embed_dim": [32],
            "num_heads": [4],
            "num_groups": [4],
            "depths": [1],
            "window_size": 12,
            "projection_dim": 32,
        },
        image_token_id=4,
    )
    words = placeholders(5, 4)
    return tr.Florence2ForConditionalGeneration(config), {
        **words,
        "pixel_values": image(8),
        "decoder_input_ids": ids(6),
        "decoder_attention_mask": mask(6),
    }


def mllama() -> Built:
    config = tr.MllamaConfig(
        text_config={
            "model_type": "mllama_text_model",
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 37,
            "cross_attention_layers": [1],
            "rope_scaling": {"rope_type": "default"},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_global_layers": 2,
            "attention_heads": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=4,
    )
    words = {"input_ids": ids(), "attention_mask": mask()}
    words["input_ids"][:, 0] = 4
    return tr.MllamaForConditionalGeneration(config), {
        **words,
        "pixel_values": torch.rand(B, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(B, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(B, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(B, L, 1, 2, dtype=torch.long),
    }


def flava() -> Built:
    config = tr.FlavaConfig(
        image_config=dict(VISION),
        text_config=dict(TEXT),
        multimodal_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37},
        projection_dim=32,
        hidden_size=32,
    )
    return tr.FlavaModel(config), {**text(), "token_type_ids": torch.zeros(B, L, dtype=torch.long), "pixel_values": image()}


def bridgetower() -> Built:
    config = tr.BridgeTowerConfig(  # type: ignore[call-arg]  # the config takes more than it declares
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
        text_config=dict(TEXT, hidden_size=64, intermediate_size=64, pad_token_id=1),
        vision_config={"hidden_size": 64, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        hidden_act="gelu",
    )
    return tr.BridgeTowerForImageAndTextRetrieval(config), {
        **text(),
        "pixel_values": image(),
        "pixel_mask": torch.ones(B, 16, 16, dtype=torch.long),
    }


def chameleon() -> Built:
    vq = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "double_latent": False,
        "latent_channels": 16,
        "in_channels": 3,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "resolution": 16,
    }
    names = {f"IMGIMG{chr(65 + row)}{chr(65 + column)}Z": 20 + 4 * row + column for row in range(4) for column in range(4)}
    names["<image>"] = 4
    config = tr.ChameleonConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocabulary_map=names,
        vq_config=vq,
        pad_token_id=0,
        max_position_embeddings=128,
    )
    return tr.ChameleonForConditionalGeneration(config), {**placeholders(64, 4), "pixel_values": image(16)}


def whisper() -> Built:
    config = tr.WhisperConfig(
        vocab_size=99,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        max_source_positions=15,
        num_mel_bins=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return tr.WhisperForConditionalGeneration(config), {"input_features": torch.rand(B, 10, 30), "decoder_input_ids": ids()}


def clap() -> Built:
    config = tr.ClapConfig(
        text_config=dict(TEXT, projection_dim=16),
        audio_config={
            "patch_embeds_hidden_size": 16,
            "hidden_size": 32,
            "projection_dim": 16,
            "num_mel_bins": 16,
            "spec_size": 32,
            "window_size": 4,
            "num_hidden_layers": 2,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "patch_size": 2,
            "patch_stride": 2,
            "num_classes": 2,
        },
        projection_dim=16,
    )
    return tr.ClapModel(config), {**text(), "input_features": torch.rand(B, 1, 32, 16)}


def idefics3() -> Built:
    config = tr.Idefics3Config(  # type: ignore[call-arg]  # the config takes more than it declares
        text_config=llama(), vision_config=dict(VISION), scale_factor=1, image_token_id=4, pad_token_id=0
    )
    return tr.Idefics3ForConditionalGeneration(config), {**placeholders(4, 4), "pixel_values": torch.rand(B, 1, 3, 16, 16)}


def lxmert() -> Built:
    config = tr.LxmertConfig(
        vocab_size=99,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=37,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=20,
        max_position_embeddings=64,
    )
    return tr.LxmertModel(config), {
        **text(),
        "token_type_ids": torch.zeros(B, L, dtype=torch.long),
        "visual_feats": torch.rand(B, 6, 20),
        "visual_pos": torch.rand(B, 6, 4),
    }


def bert() -> Built:
    return tr.BertModel(tr.BertConfig(**TEXT)), text()


def vit() -> Built:
    return tr.ViTModel(tr.ViTConfig(**VISION)), {"pixel_values": image()}
