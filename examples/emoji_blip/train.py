"""Pretrain the model from scratch on composed scenes.

    cd examples && python -m emoji_blip.train

writes ``model.safetensors`` (fp16) and ``training_log.json`` next to this file. An interrupted run continues from the
last checkpoint in ``--work-dir`` when the command is given again; other options then begin a new stage, which the
metadata records. The learning rate rises, holds and falls, and the hold does not depend on ``--steps``.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from emoji_xvlm.objectives import TrainingBatch, contrastive_loss, draw_pairs, region_loss
from emoji_xvlm.tokenizer import Tokenizer
from emoji_xvlm.training import RunConfig, add_arguments, place_of, ship, train
from torch import Tensor

from emoji_blip.evaluate import evaluate
from emoji_blip.modeling import EmojiBlip, ModelConfig
from emoji_blip.objectives import matching_loss, next_word_loss

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that decides a run, besides the sizes of the model."""

    fusion_start: int
    matching_pairs: int
    captions: int
    hard_share: float


def compute_losses(model: EmojiBlip, config: TrainConfig, batch: TrainingBatch, step: int) -> dict[str, Tensor]:
    """All losses of one batch; matching and next words join at ``fusion_start``."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    image_states = model.encode_image(batch.pixel_values)
    text_states = model.encode_text(batch.input_ids, batch.attention_mask)
    scale = model.logit_scale.exp()
    image_embeds = model.embed_image(image_states[:, 0]).float()
    similarity = scale * image_embeds @ model.embed_text(text_states[:, 0]).float().T
    losses = {
        "itc": contrastive_loss(similarity, batch.is_same_text),
        "region": region_loss(model, batch, image_states, scale),
    }
    if step >= config.fusion_start:
        count = min(config.matching_pairs, len(image_states))
        rows = draw_pairs(similarity, batch.is_same_text, count, config.hard_share, generator)
        losses["itm"] = matching_loss(model, batch.input_ids, batch.attention_mask, image_states, rows)
        last = slice(-min(config.captions, len(image_states)), None)
        losses["lm"] = next_word_loss(model, batch.input_ids[last], batch.attention_mask[last], image_states[last])
    return losses


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--decay-share", type=float, default=0.4)
    parser.add_argument("--fusion-start", type=int, default=400, help="first step with matching and next words")
    parser.add_argument("--matching-pairs", type=int, default=32)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--hard-share", type=float, default=0.5, help="share of matching negatives that are hard")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser, HERE)
    return parser.parse_args()


def main() -> None:
    """Train, score on the held-out scenes, write weights and log."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    config, place = (
        TrainConfig(**{name: getattr(arguments, name) for name in TrainConfig.__dataclass_fields__}),
        place_of(arguments),
    )
    torch.manual_seed(config.seed)
    model = EmojiBlip(ModelConfig(vocab_size=len(Tokenizer.from_file()))).to(place.device)
    losses = partial(compute_losses, model, config)
    progress = train(model, model.logit_scale, losses, config, place)
    if place.stop_at == config.steps:
        metrics = ship(model, asdict(model.config), "emoji_blip.train", progress, arguments.output, evaluate)
        print(json.dumps(metrics))


if __name__ == "__main__":
    main()
