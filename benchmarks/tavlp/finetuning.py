"""Fine-tuning of a task model, masked or dense: the same loop for all."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from emoji_xvlm.training import quick_attention
from torch import Tensor, nn

from benchmarks.tavlp.families.contract import Family, TaskModel
from benchmarks.tavlp.tasks.contract import Recipe, Task

WARM_UP_SHARE = 0.1
NEW_LAYERS_FACTOR = 2.0


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning took.

    Attributes:
        seconds: process time of all threads (on a GPU: wall time).
        losses: mean loss of every fifth of the run.
    """

    seconds: float
    losses: tuple[float, ...]


def fine_tune(model: TaskModel, task: Task, family: Family, recipe: Recipe, seed: int, device: torch.device) -> Tuning:
    """Train a model in place; the seed decides the order of the batches and the negatives.

    Raises:
        ArithmeticError: the loss is not finite.
    """
    model.train()
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, recipe.steps))
    generator = torch.Generator().manual_seed(seed)
    batches = task.training_batches(family, recipe, seed)
    losses: list[float] = []
    started = clock(device)
    for step in range(recipe.steps):
        with half_precision(device, recipe), quick_attention(device):
            loss = task.loss(model, moved(next(batches), device), generator)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ArithmeticError(f"{task.name}: the loss is {losses[-1]} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
    model.eval()
    fifth = max(1, math.ceil(len(losses) / 5))
    parts = [losses[start : start + fifth] for start in range(0, len(losses), fifth)]
    return Tuning(clock(device) - started, tuple(sum(part) / len(part) for part in parts))


def half_precision(device: torch.device, recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where the recipe asks for it; weights, losses and rankings stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if recipe.bf16 else contextlib.nullcontext()


def rate_factor(step: int, steps: int) -> float:
    """Linear rise over the first tenth of the steps, linear fall to zero over the rest."""
    rise = max(1, round(steps * WARM_UP_SHARE))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)


def moved(batch: Any, device: torch.device) -> Any:
    """A batch, a dataclass of tensors, on a device."""
    assert is_dataclass(batch)
    assert not isinstance(batch, type)
    return replace(batch, **{item.name: getattr(batch, item.name).to(device) for item in fields(batch)})


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, whose cores others may use as well; of the wall on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _optimizer(model: TaskModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with four groups: new or not, matrices (which decay) or not."""
    new = {id(parameter) for parameter in model.new_parameters()}
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for parameter in model.parameters():
        groups.setdefault((id(parameter) in new, parameter.ndim >= 2 and parameter.shape[0] > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": recipe.learning_rate * (NEW_LAYERS_FACTOR if is_new else 1),
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (is_new, decays), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
