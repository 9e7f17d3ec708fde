"""Does attention mark the useful tokens at all? Objects of pictures against token scores, in every vision layer.

python -m benchmarks.token_attention_quality [--scenes 300] [--show]

The trained example models look at pictures of emoji on a ground, of which every object pixel is known. In each vision layer:

* **coverage**: the share of object pixels in the patches of the 30 % best tokens. Chance is the share of patches.
* **rank correlation** (Spearman) of scores with object pixels per patch, mean over pictures.
* **overlap** (Fig. 2 of CoMP, CVPR 2026): of the 30 % of tokens that contribute most to the importance of parameters, the
  share that is among the 30 % best by score. A token's contribution in an MLP is sum_i (1/d) sum_j |W_ij| x_i^2: what it adds
  to the squared norms of Eq. 3, of the hidden channels i that W_out reads. The MLP of layer l is compared with the scores that
  weigh it in Eq. 4: those of the next attention, of the last one its own.

* **retrieval**: what the whole model still can when each score keeps .7 (.5) of the patches at each of three depths, so that a
  third (an eighth) is left, without training: R@1 by embeddings, of text and image, on the same pictures.

Scores are those of ``prune_tokens`` at the same places. CLS counts nowhere. Pictures are held out: every one holds a pair of
emoji that training never showed together. Errors are standard errors over pictures. About a minute on one core.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import mfcompile
from benchmarks import machine
from mfcompile.frontends.capture import capture
from mfcompile.graph import CapturedGraph
from mfcompile.passes.modalities import VISION
from mfcompile.passes.token_attention import NEGLIGIBLE
from mfcompile.passes.token_scores import SCORERS, RandomScore, TokenEvidence, weigh
from mfcompile.passes.token_sites import SitePlan, plan_sites
from mfcompile.passes.token_upstream import with_meta_tensors

RESULT = Path(__file__).resolve().parent / "results" / "token_attention_quality.json"
MODELS = ("emoji_xvlm", "emoji_blip")
SCORES = ("cit", "cls_attention", "norm", "random")
SHARE = 0.3
KEEPS = (0.7, 0.5)
RANDOM_ORDERS = (0, 1)
BATCH = 50

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One vision layer of a recorded graph.

    Attributes:
        plan: its token site.
        hidden: name of the node of its MLP's hidden channels.
        weight: (channels,) mean over outputs of the magnitudes of W_out.
    """

    plan: SitePlan
    hidden: str
    weight: Tensor


def layers_of(captured: CapturedGraph) -> list[Layer]:
    """The vision layers, in order: token sites with the hidden channels behind each."""
    regions = mfcompile.infer_regions(captured)
    nodes = {spec.name: spec.node for spec in captured.inputs}
    kinds = {nodes[item.name]: item.modality for item in regions.modalities if item.modality}
    plans, _ = plan_sites(with_meta_tensors(captured), kinds, captured.parameter_nodes)
    hidden = [unit for unit in mfcompile.find_units(captured).units if (unit.kind, unit.region) == ("channels", VISION)]
    sites = [plan for plan in plans if plan.region == VISION]
    found = []
    for plan, unit in zip(sites, hidden, strict=True):
        weight = captured.parameter(unit.output_weight).detach()
        found.append(Layer(plan, regions.evidence[unit.output_weight][0].activation, weight.abs().mean(0)))
    return found


class Watch(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, captured: CapturedGraph, names: Sequence[str]) -> None:
        super().__init__(captured.graph_module)
        self.wanted, self.seen = set(names), dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node."""
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
        return value


def scores_of(layer: Layer, seen: Mapping[str, Tensor]) -> dict[str, Array]:
    """Scorer -> (pictures, patches) scores at a layer, without CLS."""
    attention, states = layer.plan.attention, seen[layer.plan.point.name]
    logits = attention.logits(*(seen[item.name] for item in attention.operands))
    weights, valid = weigh(logits, len(states), attention.masked, NEGLIGIBLE)
    evidence = TokenEvidence(weights, states, valid, torch.zeros(len(states), dtype=torch.int64))
    return {name: SCORERS[name](evidence)[:, 1:].double().numpy() for name in SCORES}


def run_model(name: str, pictures: NDArray[np.float32]) -> Iterator[tuple[list[dict[str, Array]], list[Array]]]:
    """Of every batch: scores of every layer, and (pictures, patches) contributions in its MLP."""
    example = importlib.import_module(f"{name}.model")
    first = example.example_inputs
    text = {key: tensor[:1].repeat(BATCH, *[1] * (tensor.ndim - 1)) for key, tensor in first.items() if key != "pixel_values"}
    inputs = [{"pixel_values": torch.from_numpy(pictures[at : at + BATCH]), **text} for at in range(0, len(pictures), BATCH)]
    captured = mfcompile.capture(example.build_model(), inputs[0])
    layers = layers_of(captured)
    names = [item.name for layer in layers for item in (*layer.plan.attention.operands, layer.plan.point)]
    for batch in inputs:
        watch = Watch(captured, [*names, *(layer.hidden for layer in layers)])
        with torch.inference_mode():
            watch.run(*(batch[spec.name] for spec in captured.inputs))
            contributions = [(watch.seen[layer.hidden].square() @ layer.weight)[:, 1:].double().numpy() for layer in layers]
        yield [scores_of(layer, watch.seen) for layer in layers], contributions


def object_pixels(scenes: Any, side: int, patch: int) -> Array:
    """(pictures, patches) pixels of emoji in each patch: those that cover more than half of the ground."""
    from emoji_xvlm.scenes import load_atlas

    atlas = load_atlas()
    covered = np.zeros((len(scenes.boxes), side, side), bool)
    for index, (boxes, labels) in enumerate(zip(scenes.boxes, scenes.labels, strict=True)):
        for (left, top, right, bottom), emoji in zip(boxes, labels, strict=True):
            if emoji >= 0:
                covered[index, top:bottom, left:right] |= atlas.pictures[int(right - left)][int(emoji)][..., 3] > 0.5
    count = side // patch
    blocks = covered.reshape(len(covered), count, patch, count, patch).sum(axis=(2, 4))
    pixels: Array = blocks.reshape(len(covered), -1).astype(np.float64)
    return pixels


def best(scores: Array, count: int) -> NDArray[np.bool_]:
    """(pictures, patches) bool: the best of every picture; of equal ones the first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def ranks(values: Array) -> Array:
    """(pictures, patches) ranks, equal values sharing the mean of theirs."""
    found = np.empty_like(values)
    for row, own in zip(found, values, strict=True):
        _, places, counts = np.unique(own, return_inverse=True, return_counts=True)
        row[:] = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return found


def spearman(one: Array, other: Array) -> Array:
    """(pictures,) rank correlations."""
    first, second = (ranks(item) - ranks(item).mean(axis=1, keepdims=True) for item in (one, other))
    norm = np.sqrt((first**2).sum(1) * (second**2).sum(1))
    found: Array = np.divide((first * second).sum(1), norm, out=np.zeros(len(norm)), where=norm > 0)
    return found


def figure(values: Array) -> dict[str, float]:
    """Mean and standard error over pictures."""
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / math.sqrt(len(values)))}


def judge(name: str, scenes: Any) -> list[dict[str, Any]]:
    """A row per layer and scorer."""
    batches = list(run_model(name, scenes.pixel_values))
    objects = object_pixels(scenes, scenes.pixel_values.shape[-1], 8)
    count = round(SHARE * objects.shape[1])
    rows = []
    depth = len(batches[0][0])
    for layer in range(depth):
        contribution = np.concatenate([found[layer] for _, found in batches])
        important = best(contribution, count)
        for scorer in SCORES:
            own, following = (
                np.concatenate([found[at][scorer] for found, _ in batches]) for at in (layer, min(layer + 1, depth - 1))
            )
            covered = (objects * best(own, count)).sum(1) / objects.sum(1)
            overlap = (important & best(following, count)).sum(1) / count
            rows.append(
                {
                    "model": name,
                    "layer": layer,
                    "scorer": scorer,
                    "coverage": figure(covered),
                    "rank_correlation": figure(spearman(own, objects)),
                    "overlap": figure(overlap),
                }
            )
        covered = (objects * important).sum(1) / objects.sum(1)
        rows.append(
            {
                "model": name,
                "layer": layer,
                "scorer": "contribution",
                "coverage": figure(covered),
                "rank_correlation": figure(spearman(contribution, objects)),
            }
        )
    return rows


def retrieval(name: str, scenes: int) -> list[dict[str, Any]]:
    """R@1 in per cent, dense and with tokens dropped by each score."""
    from emoji_xvlm.evaluate import evaluate

    example = importlib.import_module(f"{name}.model")
    captured = capture(example.build_model(), example.example_inputs, export=True)
    dense = evaluate(captured.module, scenes, candidates=0)["r1"]
    rows: list[dict[str, Any]] = []
    for keep in KEEPS:
        rows.append({"model": name, "keep": keep, "scorer": "all tokens", "r1": dense})
        for scorer in SCORES:
            chosen: list[Any] = [RandomScore(seed) for seed in RANDOM_ORDERS] if scorer == "random" else [scorer]
            found = []
            for item in chosen:
                fewer = mfcompile.prune_tokens(captured, keep, scorer=item)
                found.append(evaluate(fewer.module, scenes, candidates=0)["r1"])
            rows.append({"model": name, "keep": keep, "scorer": scorer, "r1": float(np.mean(found)), "orders": len(found)})
    return rows


def run(scenes: int) -> dict[str, Any]:
    """Judge both models on the same pictures."""
    from emoji_xvlm.scenes import held_out_batch

    pictures = held_out_batch(scenes)
    objects = object_pixels(pictures, pictures.pixel_values.shape[-1], 8)
    count = round(SHARE * objects.shape[1])
    ideal = (objects * best(objects, count)).sum(1) / objects.sum(1)
    return {
        "machine": machine.describe(),
        "pictures": scenes,
        "patches": objects.shape[1],
        "best_tokens": count,
        "chance": count / objects.shape[1],
        "object_share": float(objects.sum() / pictures.pixel_values[:, 0].size),
        "ideal_coverage": figure(ideal),
        "rows": [row for name in MODELS for row in judge(name, pictures)],
        "retrieval": [row for name in MODELS for row in retrieval(name, scenes)],
    }


def tables(result: Mapping[str, Any]) -> list[str]:
    """The figures as two tables in Markdown: one row per layer, and one per score."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in result["rows"]:
        cells.setdefault((row["model"], row["layer"]), {})[row["scorer"]] = row
    shown = ("cit", "cls_attention", "norm", "random", "contribution")
    lines = [f"| model, layer | {' | '.join(shown)} | ranks: cit | ranks: norm | overlap: cit | overlap: norm |"]
    lines.append("|---" * (len(shown) + 5) + "|")
    for (model, layer), row in cells.items():
        figures = [f"{row[name]['coverage']['mean']:.2f}" for name in shown]
        figures += [f"{row[name]['rank_correlation']['mean']:+.2f}" for name in ("cit", "norm")]
        figures += [f"{row[name]['overlap']['mean']:.2f}" for name in ("cit", "norm")]
        lines.append(f"| {model}, {layer} | {' | '.join(figures)} |")
    recalls: dict[str, dict[tuple[str, float], float]] = {}
    for row in result["retrieval"]:
        recalls.setdefault(row["scorer"], {})[row["model"], row["keep"]] = row["r1"]
    columns = [(model, keep) for model in MODELS for keep in KEEPS]
    heads = [f"{model}, keep {keep}" for model, keep in columns]
    lines += ["", f"| score | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{found[column]:.1f}' for column in columns)} |" for name, found in recalls.items()]
    return lines


def main() -> None:
    """Measure, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=300, help=f"pictures, a multiple of {BATCH}")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print the figures that are there")
    arguments = parser.parse_args()
    if not arguments.show:
        torch.set_num_threads(1)
        arguments.output.write_text(json.dumps(run(arguments.scenes), indent=1) + "\n")
    result = json.loads(arguments.output.read_text())
    for line in tables(result):
        print(line)
    print(f"\nchance {result['chance']:.2f}, best possible coverage {result['ideal_coverage']['mean']:.2f}")


if __name__ == "__main__":
    main()
