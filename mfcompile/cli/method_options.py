"""The options that say what is taken out of a model before its weights are masked, and their tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from mfcompile.cli.parser import pair
from mfcompile.cli.tables import percent, table
from mfcompile.errors import InputError

if TYPE_CHECKING:
    from mfcompile.comp.modes import TokenMode, UnitMode
    from mfcompile.comp.request import JointRequest
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.graph import CapturedGraph
    from mfcompile.recipe import Recipe

STRATEGIES = ("probe", "comp", "fixed", "greedy")
COSTS = ("flops", "latency")


class _Named(argparse.Action):
    """Puts an option with a flag of its own among the method's options."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        given = list(getattr(namespace, "method_options", None) or ())
        assert option_string is not None  # it is called for a flag
        namespace.method_options = [*given, (option_string.lstrip("-"), values)]


def add_method_options(group: argparse._ArgumentGroup) -> None:
    """The options of joint pruning."""
    group.add_argument(
        "--method",
        metavar="NAME",
        help="masks: zeros in weights. comp: take out hidden channels, attention heads and tokens together, CoMP-style and "
        "one-shot (not the paper's training recipe). comp+multiflow: that, then masks at --sparsity on what is left "
        "(default: masks)",
    )
    group.add_argument(
        "--flops",
        type=_share,
        metavar="F",
        help="share of the FLOPs that comp leaves, in (0, 1] (default: 0.5)",
    )
    group.add_argument(
        "--strategy",
        action=_Named,
        choices=STRATEGIES,
        help="how comp chooses what goes next: probe tries everything and takes the cheapest, comp is the paper's (costs that "
        "fade, exploration), fixed takes turns, greedy goes by the last cost (default: probe)",
    )
    group.add_argument(
        "--cost",
        action=_Named,
        choices=COSTS,
        help="what comp divides a loss by: FLOPs that it saves, or seconds in onnxruntime, measured here (default: flops)",
    )
    group.add_argument(
        "--method-option",
        "--method_option",
        dest="method_options",
        nargs="+",
        action="extend",
        type=pair("NAME=VALUE"),
        metavar="NAME=VALUE",
        help="an option of comp: step=0.1, scorer=wanda, modes=parameters:vision,tokens:vision, loss=evaluate, samples=32",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number. Give the share of the FLOPs to leave, such as 0.5") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not in (0, 1]: it is the share of the FLOPs to leave, such as 0.5")
    return value


def joint_request_of(recipe: Recipe) -> JointRequest | None:
    """What a recipe asks to take out before masks; None where it asks for masks alone.

    Raises:
        InputError: there is no such method or option.
    """
    if recipe.method in (None, "masks") and recipe.flops is None and not recipe.method_options:
        return None
    from mfcompile.comp.request import method_request

    return method_request(recipe.method, recipe.flops, recipe.method_options, recipe.seed)


def check_method(recipe: Recipe, source: ModelSource) -> None:
    """Refuse what can be judged before the model is run.

    Raises:
        InputError: the method is not known, or not for this model, or not beside other options.
    """
    request = joint_request_of(recipe)
    if request is None:
        return
    if source.kind == "onnx":
        raise InputError(f"--method {recipe.method} rewrites PyTorch models, and {recipe.source} is an .onnx file")
    if recipe.tokens is not None:
        raise InputError(f"--method {recipe.method} chooses how many tokens stay: leave out --tokens, or cap them with caps=")
    if recipe.split:
        raise InputError(f"--method {recipe.method} writes one file: leave out --split")
    if request.options.loss == "evaluate" and source.evaluate is None:
        raise InputError("loss=evaluate asks the model's own evaluate, and model.py defines none")


def find_modes(
    captured: CapturedGraph, request: JointRequest, modalities: Mapping[str, str] | None
) -> list[UnitMode | TokenMode]:
    """What joint pruning of a model may choose of."""
    from mfcompile.comp.candidates import candidates_of

    return list(candidates_of(captured, request.options, modalities).modes)


def choices_table(modes: Sequence[UnitMode | TokenMode]) -> RenderableType:
    """What joint pruning may choose of."""
    from mfcompile.comp.modes import UnitMode

    rows = []
    for mode in modes:
        if isinstance(mode, UnitMode):
            what = f"{sum(unit.count for unit in mode.units):,} channels and heads of {len(mode.units):,} units"
        else:
            what = f"{mode.free:,} tokens at {len(mode.sites)} sites: {', '.join(site.name for site in mode.sites)}"
        rows.append((mode.name, what))
    return table("Joint pruning may choose of", ("mode", "what can go, all but one of each"), rows)


def modes_table(structure: Mapping[str, Any]) -> RenderableType:
    """What went of every mode, and what that saved."""
    rows = []
    for row in structure["modes"]:
        if "units" in row:
            went, of = (sum(unit[key] for unit in row["units"]) for key in ("removed", "elements"))
            what = f"{went:,} of {of:,} channels and heads"
        else:
            kept = [site["kept"] for site in row["sites"]]
            what = f"{percent(min(kept))} of the tokens stay at {len(kept)} " + ("site" if len(kept) == 1 else "sites")
        rows.append((row["mode"], f"{row['stages']:,}", what, percent(row["flops_saved"])))
    return table(f"Joint pruning ({structure['label']})", ("mode", ">stages", "what went", ">of the FLOPs"), rows)


def structure_lines(structure: Mapping[str, Any]) -> list[str]:
    """What is left, what was asked for, and how it was searched."""
    flops, parameters, options = structure["flops"], structure["parameters"], structure["options"]
    landed = abs(flops["share"] - structure["target"]) <= 0.01 * structure["target"]
    near = "" if landed else ", as near to it as one unit more or less brings it"
    lines = [
        f"FLOPs: {percent(flops['share'])} of the dense model's are left ({flops['left']:,} of {flops['dense']:,}; asked for: "
        f"{percent(structure['target'])}{near}). Parameters: {percent(parameters['share'])}.",
        f"Search: {options['strategy']}, {len(structure['stages'])} stages, cost per {options['cost']}; loss against the dense "
        f"model ({options['loss']}): {structure['loss']:.4g}.",
    ]
    if structure["capped"]:
        lines.append(f"note: nothing more could go of {', '.join(structure['capped'])}")
    return lines
