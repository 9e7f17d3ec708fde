"""Pretrain the model from scratch on composed scenes.

    cd examples && python -m emoji_xvlm.train --steps 790

writes ``model.safetensors`` (fp16) and ``training_log.json`` next to this file. An interrupted run continues from the
last checkpoint in ``--work-dir`` when the command is given again; other options then begin a new stage, which the
metadata records. The learning rate rises, holds and falls, and the hold does not depend on ``--steps``.
"""

import argparse
import contextlib
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from emoji_xvlm.evaluate import evaluate
from emoji_xvlm.modeling import EmojiXvlm, ModelConfig
from emoji_xvlm.objectives import (
    TrainingBatch,
    collate,
    contrastive_loss,
    masked_word_loss,
    matching_loss,
    region_loss,
)
from emoji_xvlm.scenes import load_atlas, training_batch
from emoji_xvlm.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
LOG_EVERY = 50
Metrics = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, besides the sizes of the model."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    fusion_start: int
    matching_pairs: int
    masked_pairs: int
    hard_share: float
    seed: int
    bf16: bool


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear rise, hold, cosine fall to zero over the last ``decay_share`` of the steps."""
    decay_steps = int(config.steps * config.decay_share)
    rise = min(1.0, (step + 1) / config.warmup_steps)
    progress = max(0.0, step - (config.steps - decay_steps)) / max(1, decay_steps)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: EmojiXvlm, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p.shape[0] != 1]
    plain = [p for p in model.parameters() if not (p.ndim >= 2 and p.shape[0] != 1)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def compute_losses(model: EmojiXvlm, batch: TrainingBatch, config: TrainConfig, step: int, mask_id: int) -> dict[str, Tensor]:
    """All losses of one batch; matching and masked words join at ``fusion_start``."""
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
        pairs = min(config.matching_pairs, len(image_states))
        losses["itm"] = matching_loss(model, batch, image_states, text_states, similarity, pairs, config.hard_share, generator)
        pairs = min(config.masked_pairs, len(image_states))
        losses["mlm"] = masked_word_loss(model, batch, image_states, pairs, mask_id, generator)
    return losses


def export_weights(model: EmojiXvlm, path: Path, metadata: dict[str, Any]) -> None:
    """Write fp16 weights; each metadata value is JSON text."""
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in metadata.items()})


@dataclass
class Progress:
    """How far a run is; ``stages`` holds each configuration it was continued with and the step where that began."""

    step: int = 0
    seconds: float = 0.0
    log: list[Metrics] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(path: Path, model: EmojiXvlm, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint in one move, so that an interruption leaves the old one."""
    temporary = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: EmojiXvlm, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimizer from a checkpoint; a run that has none starts at step 0."""
    if not path.exists():
        return Progress()
    stored = torch.load(path, map_location=model.logit_scale.device, weights_only=True)
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    return Progress(**stored["progress"])


def train(
    config: TrainConfig, device: torch.device, work_dir: Path, stop_at: int, eval_every: int
) -> tuple[EmojiXvlm, Progress]:
    """Train or continue up to step ``stop_at`` of ``config.steps``."""
    torch.manual_seed(config.seed)
    tokenizer, names = Tokenizer.from_file(), load_atlas().names
    model = EmojiXvlm(ModelConfig(vocab_size=len(tokenizer))).to(device)
    optimizer = build_optimizer(model, config)
    checkpoint = work_dir / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, model, optimizer)
    if not progress.stages or progress.stages[-1]["config"] != asdict(config):
        progress.stages.append({"from_step": progress.step, "config": asdict(config)})

    started = time.monotonic() - progress.seconds
    precision = torch.autocast(device.type, torch.bfloat16) if config.bf16 else contextlib.nullcontext()
    means: dict[str, list[float]] = {}
    for step in range(progress.step, stop_at):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        batch = collate(training_batch(config.seed, step, config.batch_size), tokenizer, names).to(device)
        with precision:
            losses = compute_losses(model, batch, config, step, tokenizer.mask_id)
            loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        for name, value in losses.items():
            means.setdefault(name, []).append(float(value.detach()))

        progress.step = step + 1
        if progress.step % LOG_EVERY == 0 or progress.step == stop_at:
            progress.seconds = time.monotonic() - started
            row: Metrics = {"step": progress.step, "seconds": round(progress.seconds, 1)}
            row |= {name: round(float(np.mean(values)), 4) for name, values in means.items()}
            if progress.step % eval_every == 0 and progress.step < stop_at:
                row |= {name: round(value, 2) for name, value in evaluate(model, candidates=0).items()}
            progress.log.append(row)
            means = {}
            print(json.dumps(row), flush=True)
            save_checkpoint(checkpoint, model, optimizer, progress)
    return model, progress


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=790)
    parser.add_argument("--stop-at", type=int, help="leave a checkpoint at this step and write no weights")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--decay-share", type=float, default=0.5)
    parser.add_argument("--fusion-start", type=int, default=300, help="first step with matching and masked words")
    parser.add_argument("--matching-pairs", type=int, default=24)
    parser.add_argument("--masked-pairs", type=int, default=32)
    parser.add_argument("--hard-share", type=float, default=0.5, help="share of matching negatives that are hard")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--work-dir", type=Path, default=HERE / "runs")
    parser.add_argument("--output", type=Path, default=HERE / "model.safetensors")
    return parser.parse_args()


def main() -> None:
    """Train, score on the held-out scenes, write weights and log."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(**{name: getattr(arguments, name) for name in TrainConfig.__dataclass_fields__})
    stop_at = min(arguments.steps, arguments.stop_at or arguments.steps)
    model, progress = train(config, torch.device(arguments.device), arguments.work_dir, stop_at, arguments.eval_every)
    if stop_at < config.steps:
        return
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})  # as shipped
    metrics = {name: round(value, 2) for name, value in evaluate(model).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    metadata = {
        "command": " ".join(["python -m emoji_xvlm.train", *sys.argv[1:]]),
        "stages": progress.stages,
        "model_config": asdict(model.config),
        "seconds": round(progress.seconds),
        "versions": versions,
        "held_out": metrics,
    }
    export_weights(model, arguments.output, metadata)
    document = json.dumps({**metadata, "log": progress.log}, indent=1)
    arguments.output.with_name("training_log.json").write_text(document + "\n", encoding="utf-8")
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
