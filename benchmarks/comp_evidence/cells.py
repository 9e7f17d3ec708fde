"""Cells: one arm at one size, with one seed, trained or not, and its held-out score."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.comp_evidence.arms import ARMS, INSIDE, ONE_SHOT, RECOVERED, SEEDS, TUNINGS, Arm, arms_of, trained_strategy
from benchmarks.comp_evidence.space import SharedSpace
from benchmarks.comp_evidence.subject import EXAMPLES, Score, Subject, calibration, training
from mfcompile.comp.loss import OutputLoss, calibration_inputs
from mfcompile.comp.scoring import CalibratedScores
from mfcompile.comp.space import Cutting
from mfcompile.comp.structure import Structure
from mfcompile.comp.trained_space import TrainingOptions
from mfcompile.comp.training import train_jointly
from mfcompile.errors import InputError
from mfcompile.files import write_atomically
from mfcompile.module_copy import with_weights
from mfcompile.passes.flops import count_flops
from mfcompile.passes.mode_search import SearchOptions, Stage, search_modes
from mfcompile.passes.random_numbers import seeded

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "comp"
SEARCHES = ROOT / "out" / "comp"
"""What searches found, which cells with and without training share; found again where it is missing."""
VERSION = 2
TOKEN_STEP = 4
STEPS = 60
RATE = 1e-4
STAGE = 0.1
"""FLOPs that a stage of pruning inside fine-tuning saves at most."""
MODE_STAGE = 0.4
"""Share of what a mode has left that goes in such a stage at most."""

SCORE = Score()


@dataclass(frozen=True)
class Cell:
    """A place in the tables."""

    arm: str
    flops: float
    seed: int
    tuning: str = ONE_SHOT

    def path(self, results: Path = RESULTS) -> Path:
        """The file of its result."""
        return results / self.tuning / f"{self.arm}-{self.flops:g}-{self.seed}.json"

    @property
    def command(self) -> str:
        """Makes it again."""
        chosen = f"--arm {self.arm} --flops {self.flops:g} --seed {self.seed} --tuned {self.tuning}"
        return f"python -m benchmarks.comp_evidence run {chosen}"

    def config(self) -> dict[str, Any]:
        """All that its figures depend on."""
        config = {
            "version": VERSION,
            "arm": asdict(ARMS[self.arm]),
            "search": ARMS[self.arm].options(self.seed),
            "flops": self.flops,
            "seed": self.seed,
            "tuning": self.tuning,
            "score": asdict(SCORE),
            "token_step": TOKEN_STEP,
            "checkpoint": hashlib.sha256((EXAMPLES / "emoji_xvlm" / "model.safetensors").read_bytes()).hexdigest()[:16],
        }
        return config if self.tuning == ONE_SHOT else {**config, "steps": STEPS, "rate": RATE, "stage": [STAGE, MODE_STAGE]}


def cells(
    arms: Sequence[str] = (), flops: Sequence[float] = (), seeds: Sequence[int] = (), tunings: Sequence[str] = ()
) -> Iterator[Cell]:
    """The wanted cells (all where nothing is named): size by size, without training first, then by seed."""
    for share, tuning, seed in product(flops or (0.5, 0.35, 0.7), tunings or TUNINGS, seeds or SEEDS):
        yield from (Cell(arm, share, seed, tuning) for arm in arms_of(tuning) if arm in (arms or ARMS))


def read(cell: Cell, results: Path = RESULTS) -> dict[str, Any] | None:
    """The result of a cell; None where there is none of this configuration."""
    path = cell.path(results)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["config"] == json.loads(json.dumps(cell.config())) else None


def run(cell: Cell, subject: Subject, results: Path = RESULTS) -> dict[str, Any]:
    """The result of a cell, from its file or made now."""
    record = read(cell, results)
    if record is None:
        started = time.process_time()
        found = measured(cell, subject)
        record = {
            "config": cell.config(),
            **found,
            "cpu_s": round(time.process_time() - started, 1),
            "machine": machine.describe(),
            "command": cell.command,
        }
        path = cell.path(results)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    return record


def dense_score(results: Path = RESULTS, subject: Subject | None = None) -> dict[str, float] | None:
    """The score of the dense model, from its file; made where a subject is given."""
    path, config = results / "dense.json", {"score": asdict(SCORE)}
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config"] == config:
            found: dict[str, float] = record["metrics"]
            return found
    if subject is None:
        return None
    metrics = SCORE.of(subject.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({"config": config, "metrics": metrics}, indent=1) + "\n").encode())
    return metrics


def measured(cell: Cell, subject: Subject) -> dict[str, Any]:
    """Prune, train where that is asked for, and score; ``{"cannot_reach": why}`` where the arm cannot be that small."""
    arm = ARMS[cell.arm]
    try:
        if cell.tuning == INSIDE:
            module, share, stages, losses = inside(cell, arm, subject)
        else:
            structure, stages = searched(cell, subject)
            module, share = built(structure, subject)
            losses = train(module, cell.seed, STEPS, subject) if cell.tuning == RECOVERED else []
    except InputError as error:
        if "cannot be reached" not in str(error):
            raise
        return {"cannot_reach": str(error)}
    trace = [[stage.mode, stage.why, round(stage.flops, 4), round(stage.loss, 4)] for stage in stages]
    return {"metrics": SCORE.of(module), "achieved": share, "stages": trace, "losses": losses}


def searched(cell: Cell, subject: Subject, folder: Path = SEARCHES) -> tuple[Structure, tuple[Stage, ...]]:
    """What ``search`` finds for a cell, from its file or found now."""
    config = replace(cell, tuning=ONE_SHOT).config()
    path = folder / f"{hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        structure, stages = search(ARMS[cell.arm], cell.flops, cell.seed, subject)
        plain = {"structure": structure.as_dict(), "stages": [stage.as_dict() for stage in stages]}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(plain).encode())
    found = json.loads(path.read_text(encoding="utf-8"))
    return Structure.of(found["structure"]), tuple(Stage(**stage) for stage in found["stages"])


def search(arm: Arm, flops: float, seed: int, subject: Subject) -> tuple[Structure, tuple[Stage, ...]]:
    """What ``mfcompile.prune_jointly`` finds, over shared graphs and with tokens in steps of ``TOKEN_STEP``."""
    options = arm.options(seed)
    dense = subject.graphs.dense
    batches = calibration_inputs(dense.module, [calibration(seed)], options["samples"])
    modes = [subject.modes[name] for name in arm.modes]
    with seeded(seed, dense.module):
        measure = OutputLoss(dense.module, batches, "cos", options["outputs"])
        score = CalibratedScores(arm.scorer, batches, None, None)
        cutting = Cutting(arm.token_scorer)
        space = SharedSpace(subject.graphs, TOKEN_STEP, modes, score, measure, None, cutting, mode_step=options["mode_step"])
        if space.flops(space.least()) > flops * 1.01:
            raise InputError(f"flops={flops:g} cannot be reached: {space.flops(space.least()):.3f} is the least")
        found = search_modes(space, flops, SearchOptions(strategy=arm.strategy, step=options["step"], seed=seed))
    return Structure(dict(found.state.removed), space.keep(found.state.gone), cutting), found.stages


def built(structure: Structure, subject: Subject) -> tuple[nn.Module, float]:
    """The smaller module, on weights of its own, and its share of the FLOPs."""
    smaller = structure.apply(subject.graphs.dense)
    module: nn.Module = smaller.module
    own = {name: values.detach().clone() for name, values in module.named_parameters()}
    assert smaller.exported is not None
    assert subject.graphs.dense.exported is not None  # programs are what is cut
    share = count_flops(smaller.exported.program).total / count_flops(subject.graphs.dense.exported.program).total
    return with_weights(module, own), share


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for all that is trained."""
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)


def train(module: nn.Module, seed: int, steps: int, subject: Subject, skip: int = 0) -> list[float]:
    """Train a module in place on the batches of a seed, but for the first ones; gives the losses."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    chosen, losses = optimizer(parameters), []
    for index, batch in enumerate(training(seed, skip + steps)):
        if index >= skip:
            loss = subject.loss(module, batch)
            chosen.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            chosen.step()
            losses.append(round(loss.item(), 4))
    return losses


def stage_steps(flops: float) -> int:
    """Steps of one stage, so that about half of all are taken in stages: most stages save less than the largest may."""
    return max(1, STEPS // 3 // math.ceil((1 - flops) / STAGE))


def inside(cell: Cell, arm: Arm, subject: Subject) -> tuple[nn.Module, float, tuple[Stage, ...], list[float]]:
    """Pruned by ``mfcompile.train_jointly``, and trained on until all steps are taken."""
    options = {**arm.options(cell.seed), "strategy": trained_strategy(arm), "step": STAGE, "mode_step": MODE_STAGE}
    del options["outputs"]  # stages are judged by the loss that is trained
    judged = calibration(10_000 + cell.seed)

    def skill(module: nn.Module) -> float:
        with torch.no_grad():
            return -subject.loss(module, judged).item()

    steps = stage_steps(cell.flops)
    done = train_jointly(
        subject.captured,
        flops=cell.flops,
        loss_fn=subject.loss,
        batches=list(training(cell.seed, STEPS)),
        evaluate=skill,
        calibration=[calibration(cell.seed)],
        optimizer=optimizer,
        training=TrainingOptions(stage_steps=steps, recovery_steps=0),
        options=options,
    )
    taken = steps * len(done.stages)
    losses = train(done.module, cell.seed, max(STEPS - taken, 0), subject, min(taken, STEPS))
    return done.module, done.flops[1] / done.flops[0], done.stages, losses
