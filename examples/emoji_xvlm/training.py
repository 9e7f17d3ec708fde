"""The training run that both example models share: stream of scenes, optimizer, checkpoints, log and what is shipped."""

import argparse
import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from emoji_xvlm.evaluate import evaluate
from emoji_xvlm.objectives import TrainingBatch, collate
from emoji_xvlm.scenes import load_atlas, training_batch
from emoji_xvlm.tokenizer import Tokenizer

LOG_EVERY = 50
Metrics = dict[str, float]


@dataclass(frozen=True)
class RunConfig:
    """What decides a run, besides the sizes of the model and the weights of its losses."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_share: float
    seed: int
    bf16: bool


@dataclass
class Progress:
    """How far a run is; ``stages`` holds each configuration it was continued with and the step where that began."""

    step: int = 0
    seconds: float = 0.0
    log: list[Metrics] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a run computes and keeps its checkpoint, where it pauses and how often it is scored."""

    device: torch.device
    work_dir: Path
    stop_at: int
    eval_every: int


Losses = Callable[[TrainingBatch, int], dict[str, Tensor]]


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """Linear rise, hold, cosine fall to zero over the last ``decay_share`` of the steps."""
    decay_steps = int(config.steps * config.decay_share)
    rise = min(1.0, (step + 1) / config.warmup_steps)
    progress = max(0.0, step - (config.steps - decay_steps)) / max(1, decay_steps)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2 and p.shape[0] != 1]
    plain = [p for p in model.parameters() if not (p.ndim >= 2 and p.shape[0] != 1)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def quick_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Chooses how attention is computed inside it; the result is the same.

    With as few tokens as here, the backward pass of the fused kernel is slow on a CPU: plain products take a quarter off
    the time of a step.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Replace the checkpoint in one move, so that an interruption leaves the old one."""
    temporary = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimizer from a checkpoint; a run that has none starts at step 0."""
    if not path.exists():
        return Progress()
    stored = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    return Progress(**stored["progress"])


def train(model: nn.Module, logit_scale: Tensor, losses: Losses, config: RunConfig, place: Place) -> Progress:
    """Train a model, or continue, up to step ``place.stop_at`` of ``config.steps``.

    Args:
        model: on ``place.device``; filled from the checkpoint if there is one, and trained.
        logit_scale: () the parameter that the contrastive loss multiplies by; held at a factor of 100 at most, as CLIP.
        losses: the losses of a batch at a step; their sum is minimized.
        config: of the run; differs from that of the checkpoint where a new stage begins.
        place: where and how far.
    """
    tokenizer, names = Tokenizer.from_file(), load_atlas().names
    optimizer = build_optimizer(model, config)
    checkpoint = place.work_dir / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, model, optimizer)
    if not progress.stages or progress.stages[-1]["config"] != asdict(config):
        progress.stages.append({"from_step": progress.step, "config": asdict(config)})

    started = time.monotonic() - progress.seconds
    precision = torch.autocast(place.device.type, torch.bfloat16) if config.bf16 else contextlib.nullcontext()
    means: dict[str, list[float]] = {}
    for step in range(progress.step, place.stop_at):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
        batch = collate(training_batch(config.seed, step, config.batch_size), tokenizer, names).to(place.device)
        with precision, quick_attention(place.device):
            parts = losses(batch, step)
            loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            logit_scale.clamp_(max=math.log(100))
        for name, value in parts.items():
            means.setdefault(name, []).append(float(value.detach()))

        progress.step = step + 1
        if progress.step % LOG_EVERY == 0 or progress.step == place.stop_at:
            progress.seconds = time.monotonic() - started
            row: Metrics = {"step": progress.step, "seconds": round(progress.seconds, 1)}
            row |= {name: round(float(np.mean(values)), 4) for name, values in means.items()}
            if progress.step % place.eval_every == 0 and progress.step < place.stop_at:
                row |= {name: round(value, 2) for name, value in evaluate(model, candidates=0).items()}
            progress.log.append(row)
            means = {}
            print(json.dumps(row), flush=True)
            save_checkpoint(checkpoint, model, optimizer, progress)
    return progress


def ship(
    model: nn.Module,
    model_config: dict[str, Any],
    program: str,
    progress: Progress,
    output: Path,
    score: Callable[[nn.Module], Metrics],
) -> Metrics:
    """Write the weights in fp16 with what made them, and ``training_log.json`` next to them.

    Args:
        model: trained; rounded to fp16 in place, so that what is scored is what is shipped.
        model_config: sizes of the model.
        program: the module that was run, for the command in the metadata.
        progress: of the run.
        output: the safetensors file. Its metadata values are JSON text.
        score: the held-out score.

    Returns:
        The held-out score.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    metrics = {name: round(value, 2) for name, value in score(model).items()}
    metadata = {
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "stages": progress.stages,
        "model_config": model_config,
        "seconds": round(progress.seconds),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "held_out": metrics,
    }
    # named_parameters gives a tied parameter once, under its first name; a state_dict gives it under all its names.
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.named_parameters()}
    save_file(tensors, output, metadata={name: json.dumps(value) for name, value in metadata.items()})
    document = json.dumps({**metadata, "log": progress.log}, indent=1)
    output.with_name("training_log.json").write_text(document + "\n", encoding="utf-8")
    return metrics


def add_arguments(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Options of `RunConfig` without the number of steps and the batch size, of `Place`, and where the weights go."""
    parser.add_argument("--stop-at", type=int, help="leave a checkpoint at this step and write no weights")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--work-dir", type=Path, default=folder / "runs")
    parser.add_argument("--output", type=Path, default=folder / "model.safetensors")


def place_of(arguments: argparse.Namespace) -> Place:
    """The place that the command line asks for; its folder exists afterwards."""
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    stop_at = min(arguments.steps, arguments.stop_at or arguments.steps)
    return Place(torch.device(arguments.device), arguments.work_dir, stop_at, arguments.eval_every)
