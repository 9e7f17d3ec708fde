"""The options that say how weights are chosen: sparsity, criterion, allocation, pattern, update."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mfcompile.cli.method_options import check_method, joint_request_of
from mfcompile.cli.parser import fraction, pair, whole_number
from mfcompile.cli.token_options import check_tokens, read_tokens
from mfcompile.errors import InputError
from mfcompile.recipe import ROUNDINGS, UPDATES

if TYPE_CHECKING:
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.passes.criteria.base import Pruner
    from mfcompile.recipe import Recipe

Sparsity = float | Mapping[str, float]

DEFAULT_CRITERION = "multiflow"


def add_selection_options(group: argparse._ArgumentGroup) -> None:
    """The options of criterion x allocation x pattern x update."""
    group.add_argument(
        "--criterion",
        metavar="NAME",
        help="what ranks the weights: multiflow, multiflow-inverted, magnitude, random, lamp, l2, wanda, snip, itersnip, "
        "chita, chita++, tamt, or one that an installed package registers; the ones with gradients need loss_fn in model.py "
        "(default: the criterion that model.py defines, else multiflow)",
    )
    group.add_argument(
        "--criterion-option",
        "--criterion_option",
        dest="criterion_options",
        nargs="+",
        action="extend",
        type=pair("NAME=VALUE"),
        metavar="NAME=VALUE",
        help="an option of the criterion: steps=20",
    )
    group.add_argument(
        "--allocation",
        metavar="NAME",
        help="how the budget is shared out: magnitude-per-region, magnitude-global, score-per-region, score-global, uniform, "
        "uniform-rows, erk, or a YAML file of PATTERN: SPARSITY (default: as the criterion was published)",
    )
    group.add_argument(
        "--pattern",
        metavar="PATTERN",
        help="the shape in which weights are removed: unstructured, N:M along the inputs (2:4), or blocks of outputs x inputs, "
        "1x4, 4x1 or 16x1 (default: unstructured)",
    )
    group.add_argument(
        "--update",
        choices=UPDATES,
        help="rewrite the kept weights after masking, and with gradual choose them anew (default: leave them)",
    )
    group.add_argument(
        "--update-option",
        "--update_option",
        dest="update_options",
        nargs="+",
        action="extend",
        type=pair("NAME=VALUE"),
        metavar="NAME=VALUE",
        help="an option of the update: damping=0.01, passes=8, memory_mib=512",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help="exact budgets sum to the request; official repeats the published truncation (default: exact)",
    )
    group.add_argument("--seed", type=whole_number, metavar="N", help="seed of everything random (default: 0)")


def sparsity(text: str) -> Sparsity:
    """A reader of one sparsity: ``0.63``, or ``vision=0.5,text=0.7,fusion=0.6``."""
    if "=" not in text:
        return fraction(text)
    read = pair("REGION=SPARSITY")
    found: dict[str, float] = {}
    for region, value in map(read, text.split(",")):
        if region in found:
            raise argparse.ArgumentTypeError(f"{text!r} gives the region {region} twice")
        found[region] = fraction(value)
    return found


def sparsities(given: Sequence[Sparsity] | None) -> tuple[Sparsity, ...]:
    """The sparsities of ``--sparsity``, where regions may also be given one by one.

    Raises:
        InputError: plain numbers and regions are mixed, or one is given twice.
    """
    if not given:
        return ()
    regions = [item for item in given if isinstance(item, Mapping)]
    if not regions:
        if len(set(given)) < len(given):
            raise InputError("--sparsity: the same sparsity is given twice")
        return tuple(given)
    if len(regions) < len(given):
        raise InputError("--sparsity: give numbers (0.63 0.75: one result each) or regions (vision=0.5,text=0.7), not both")
    merged: dict[str, float] = {}
    for item in regions:
        twice = next((region for region in item if region in merged), None)
        if twice is not None:
            raise InputError(f"--sparsity: the region {twice} is given twice")
        merged |= item
    return (merged,)


def sparsity_name(value: Sparsity) -> str:
    """How a directory with the result of one sparsity is called."""
    if isinstance(value, Mapping):
        return "-".join(f"{region}-{fraction:g}" for region, fraction in value.items())
    return f"{value:.15g}"


def sets_sparsity(options: Mapping[str, Any]) -> bool:
    """Options of a recipe say by an allocation or a pattern how much is removed, so that there is no sparsity to ask for."""
    return isinstance(options.get("allocation"), Mapping) or ":" in options.get("pattern", "")


def check_request(recipe: Recipe, wanted: Sequence[Sparsity], source: ModelSource) -> Pruner:
    """Refuse what can be judged before the model is run: nothing is calibrated for a request that cannot be met.

    Args:
        recipe: what is asked for.
        wanted: all sparsities that are asked for; none for the recipe's.
        source: the model.

    Returns:
        What will choose the masks.

    Raises:
        InputError: options are not valid, or not together, or not for a model of this kind.
        CalibrationError: the criterion needs a loss, and the source defines none.
    """
    from mfcompile.onnx_entry import refuse_untrainable
    from mfcompile.passes.mask_selection import SelectionOptions, check_needs, check_options
    from mfcompile.statistics import NO_STATISTICS

    if source.kind == "onnx" and recipe.split:
        raise InputError(f"{recipe.source} is pruned as it is, in one file: leave out --split, which is for PyTorch models")
    check_tokens(recipe, source.kind)
    check_method(recipe, source)
    request = joint_request_of(recipe)
    for one in wanted or (recipe.sparsity,):
        options = SelectionOptions(**{**selection_of(recipe, source.criterion), "sparsity": one})
        options = options if request is None else request.mask_options(options)
        chosen = check_options(options)
        refuse_untrainable(source.model, chosen, recipe.update)
        check_needs(chosen, NO_STATISTICS, tuple, source.loss_fn)
    return chosen


def read_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the command line in the form that a recipe keeps them.

    Raises:
        InputError: the file of an allocation cannot be read.
    """
    changed = dict(options)
    for key in ("criterion_options", "update_options", "method_options"):
        if key in changed:
            from mfcompile.passes.variants import option_value

            changed[key] = {name: option_value(value) for name, value in changed[key].items()}
    if "tokens" in changed:
        changed["tokens"] = read_tokens(changed["tokens"])
    if isinstance(changed.get("allocation"), str) and changed["allocation"].endswith((".yaml", ".yml", ".json")):
        changed["allocation"] = read_allocation(Path(changed["allocation"]))
    return changed


def read_allocation(path: Path) -> dict[str, float]:
    """Pattern -> sparsity, from a YAML (or JSON) file.

    Raises:
        InputError: the file is missing, or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the allocation {path} cannot be read: {error}") from error
    if not isinstance(document, dict) or not document:
        raise InputError(f"the allocation {path} holds no mapping. Write a line per layer: 'vision.*: 0.5'")
    return {str(pattern): value for pattern, value in document.items()}


def selection_of(recipe: Recipe, criterion: Any = None) -> dict[str, Any]:
    """What a recipe says about the choice of weights, as ``compile_pruned`` takes it.

    Args:
        recipe: the recipe.
        criterion: the source's own criterion object, meant where the recipe names none, or it.

    Raises:
        InputError: what the source calls criterion is none, or has no such option.
    """
    from mfcompile.passes.criteria.base import Pruner

    if criterion is not None and not isinstance(criterion, Pruner):
        raise InputError(
            f"`criterion` in {recipe.source} is a {type(criterion).__name__}, not a Criterion object. Make a subclass of "
            f"mfcompile.Criterion and assign an object of it, or rename the variable"
        )
    named = recipe.criterion or (recipe.method or "").partition("+")[2] or None
    is_own = criterion is not None and named in (None, criterion.name)
    return {
        "sparsity": recipe.sparsity,
        "criterion": _with_options(criterion, recipe) if is_own else named or DEFAULT_CRITERION,
        "criterion_options": {} if is_own else dict(recipe.criterion_options),
        "allocation": recipe.allocation,
        "pattern": recipe.pattern,
        "update": recipe.update,
        "update_options": dict(recipe.update_options),
        "rounding": recipe.rounding,
        "seed": recipe.seed,
    }


def _with_options(criterion: Any, recipe: Recipe) -> Any:
    """The source's own criterion, with the options that the recipe gives it.

    Raises:
        InputError: it has no such option.
    """
    known = [item.name for item in fields(criterion) if item.init] if is_dataclass(criterion) else []
    odd = next((name for name in recipe.criterion_options if name not in known), None)
    if odd is not None:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"`criterion` in {recipe.source}, {criterion.name!r}, has no option {odd!r}; {has}")
    return replace(criterion, **recipe.criterion_options) if recipe.criterion_options else criterion
