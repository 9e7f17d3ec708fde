"""``mfcompile prune``: from a model to a directory of pruned artefacts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli import plan
from mfcompile.cli.console import StageProgress, Terminal
from mfcompile.cli.loading import announce, load_recipe, merged, option
from mfcompile.cli.method_options import add_method_options, joint_request_of
from mfcompile.cli.parser import (
    Subparsers,
    add_calibration_options,
    add_debug_option,
    add_format_options,
    add_region_options,
)
from mfcompile.cli.pruning_options import (
    DEFAULT_CRITERION,
    Sparsity,
    add_selection_options,
    check_request,
    read_options,
    selection_of,
    sets_sparsity,
    sparsities,
    sparsity,
    sparsity_name,
)
from mfcompile.cli.token_options import add_token_options, request_of
from mfcompile.files import staged_directory
from mfcompile.recipe import PRECISIONS, WEIGHTINGS, Recipe

if TYPE_CHECKING:
    from mfcompile.cli.evaluation import Evaluation
    from mfcompile.compile import CompiledModel
    from mfcompile.frontends.sources import ModelSource

DESCRIPTION = """\
Prune a model and write what is left of it: model.onnx, model.safetensors, masks.safetensors, recipe.yaml,
report.json and a picture of the sparsity per layer. The directory appears complete or not at all.

The ONNX file is compared with the pruned PyTorch model before it is published; a difference beyond the
tolerance is an error. A model that cannot be written as ONNX is published without it, with exit status 1.
Latency is measured, on this machine, and stated plainly."""

EXAMPLES = """\
examples:
  mfcompile prune model.py --sparsity 0.63
  mfcompile prune ./blip-itm -o blip-63 --num-calibration-samples 128 --values fp16
  mfcompile prune model.py --sparsity 0.5 0.63 0.75      three results from one calibration, in DIR/0.5, DIR/0.63, ...
  mfcompile prune model.py --sparsity vision=0.5,text=0.7,fusion=0.6
  mfcompile prune model.py --criterion wanda --pattern 2:4 --update sparsegpt
  mfcompile prune model.py --tokens 0.7                  fewer image tokens as well, which is what makes files faster
  mfcompile prune model.py --method comp --flops 0.5     fewer channels, heads and tokens: faster everywhere
  mfcompile prune model.py --method comp+multiflow --flops 0.6 --sparsity 0.5
  mfcompile prune model.py --split regions               vision.onnx, text.onnx and fusion.onnx, which chain
  mfcompile prune model.py --dry-run --ignore region:fusion 're:.*\\.pooler'
  mfcompile prune model.onnx --calibration batches.npz   no PyTorch model needed
  mfcompile prune model-pruned/recipe.yaml -o again      run a recipe again; its masks must come out the same

calibration data comes from calibration_batches in model.py: an iterable, or a function that returns one; --calibration
takes it from a file instead, which an .onnx file needs."""

SOURCE_HELP = (
    "a model.py, a Hugging Face model directory, a .pt2 archive, an .onnx file, or a recipe.yaml that an earlier run wrote"
)


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "prune",
        help="prune a model and export it",
        usage="mfcompile prune SOURCE [--sparsity S] [-o DIR] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=SOURCE_HELP)
    how = parser.add_argument_group("how much, and how")
    how.add_argument(
        "--sparsity",
        nargs="+",
        action="extend",
        type=sparsity,
        metavar="S",
        help="fraction of the weights to remove, in [0, 1); several give a result each, from one calibration; "
        "REGION=S,REGION=S gives every region its own (default: 0.63, or what the pattern or the allocation sets)",
    )
    add_selection_options(how)
    add_token_options(how)
    add_method_options(how)
    add_calibration_options(how)
    how.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="float64 calibrates a copy of the model in float64: masks then do not depend on how small batches are cut "
        "(default: model)",
    )
    how.add_argument(
        "--weighting",
        choices=WEIGHTINGS,
        help="cip weighs tokens by the attention that they receive when norms are taken (CoMP, CVPR 2026; default: none)",
    )
    add_region_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output-dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="directory to write (default: <name of the source>-pruned here)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the output directory if there is one")
    add_format_options(output)
    output.add_argument("--no-onnx", dest="onnx", action="store_false", default=None, help="write no ONNX file")
    output.add_argument(
        "--no-evaluate",
        dest="evaluate",
        action="store_false",
        default=None,
        help="do not run the model's own evaluate before and after",
    )
    output.add_argument("--dry-run", action="store_true", help="show the plan; write nothing")
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile prune``."""
    wanted = sparsities(args.sparsity)
    recipe = read_recipe(args, wanted, terminal)
    for one in wanted:
        recipe.override({"sparsity": one})  # refuses what is no sparsity before the model is loaded
    if args.dry_run:
        plan.show(recipe, wanted, terminal)
        return 0
    from mfcompile.cli import outputs, results
    from mfcompile.cli.evaluation import DENSE, Evaluation

    directory = args.output_dir or Path(f"{_stem(recipe.source)}-pruned")
    outputs.check_directory(directory, overwrite=args.overwrite)
    with terminal.progress() as progress:
        source = load_recipe(recipe, progress)
        check_request(recipe, wanted, source)
        terminal.note(f"{recipe.source} -> {directory}")
        compiled = _compile(source, recipe, args, terminal, progress)
        recipe.check_reproduced(compiled.digest, compiled.masks.fingerprint, compiled.report["versions"])
        evaluation = Evaluation(source.evaluate if recipe.evaluate else None, progress)
        evaluation.add(DENSE, source.model)
        if len(wanted) > 1:
            with staged_directory(directory, overwrite=args.overwrite) as staging:
                reports = _publish_several(staging, directory, wanted, source, recipe, compiled, evaluation, progress)
        else:
            report = _publish(directory, directory, args.overwrite, source, recipe, compiled, evaluation, progress)
            reports = {str(directory): report}
    for place, report in reports.items():
        results.show(report, Path(place), recipe.source, terminal)
    if len(reports) > 1:
        results.show_sparsities(reports, terminal)
    if recipe.digest:
        terminal.say(f"The recipe was reproduced: its masks have the recorded digest {recipe.digest[:16]}….")
    refused = {place: report["export_refused"] for place, report in reports.items() if "export_refused" in report}
    for place, reason in refused.items():
        terminal.fail(f"there is no model.onnx: {reason}. Everything else was written to {place}")
    return 1 if refused else 0


def _publish_several(
    staging: Path,
    directory: Path,
    wanted: Sequence[Sparsity],
    source: ModelSource,
    recipe: Recipe,
    compiled: CompiledModel,
    evaluation: Evaluation,
    progress: StageProgress,
) -> dict[str, dict[str, Any]]:
    """One result per sparsity in a directory that becomes ``directory``; where each will lie -> its report."""
    reports = {}
    for one in wanted:
        if one != compiled.pruned_sparsity:
            compiled = compiled.at_sparsity(one, progress)
        name = sparsity_name(one)
        report = _publish(staging / name, directory / name, False, source, recipe, compiled, evaluation, progress)
        reports[str(directory / name)] = report
    return reports


def _publish(
    place: Path,
    final: Path,
    overwrite: bool,
    source: ModelSource,
    recipe: Recipe,
    compiled: CompiledModel,
    evaluation: Evaluation,
    progress: StageProgress,
) -> dict[str, Any]:
    """Score and write one result at ``place``, which ends up as ``final``; its report."""
    from mfcompile.cli import outputs
    from mfcompile.cli.evaluation import PRUNED

    own = evaluation.of_dense()
    own.add(PRUNED, compiled.module)
    # Sparsities by layer say it all: what they come to would be a second request. A criterion that model.py brings has no
    # name that another file would know: it stays the file's own.
    sparsity = None if isinstance(recipe.allocation, Mapping) else compiled.pruned_sparsity
    named = recipe.criterion or (recipe.method or "").partition("+")[2]
    criterion = named or (None if source.criterion else DEFAULT_CRITERION)
    ran = replace(recipe, sparsity=sparsity, criterion=criterion)
    return outputs.publish(place, overwrite, source, ran, compiled, own, progress, beside=final)


def read_recipe(args: argparse.Namespace, wanted: Sequence[Sparsity], terminal: Terminal) -> Recipe:
    """What is asked for: the options of a recipe, if SOURCE is one, overridden by those of the command line.

    Args:
        args: the command line.
        wanted: the sparsities that it asks for; the first is the recipe's.
        terminal: for notes.

    Raises:
        InputError: an option cannot have its value, or the recipe is not valid.
    """
    names = {item.name for item in fields(Recipe)} - {"source", "sparsity", "digest", "fingerprint", "versions"}
    given = read_options({name: value for name in names if (value := option(args, name)) is not None})
    given |= {"sparsity": wanted[0]} if wanted else {}
    if args.source.suffix not in (".yaml", ".yml"):
        return Recipe(source=args.source, **given)
    recorded = Recipe.load(args.source)
    if "sparsity" not in given and sets_sparsity(given):
        given["sparsity"] = None  # the recorded one was of another allocation or pattern
    recipe = recorded.override(given)
    changed = recorded.mask_options_changed(recipe)
    if changed:
        terminal.note(f"the recipe is run with another {', '.join(changed)}: its recorded digest is not compared")
    return recipe


def _stem(source: Path) -> str:
    resolved = source.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def _compile(
    source: ModelSource, recipe: Recipe, args: argparse.Namespace, terminal: Terminal, progress: StageProgress
) -> CompiledModel:
    from mfcompile.compile import compile_pruned
    from mfcompile.passes.criteria.base import Need
    from mfcompile.passes.criteria.registry import pruner
    from mfcompile.passes.mask_selection import SelectionOptions

    selection = selection_of(recipe, source.criterion)
    request = joint_request_of(recipe)
    masks = SelectionOptions(**selection) if request is None else request.mask_options(SelectionOptions(**selection))
    chosen = pruner(masks.criterion, masks.criterion_options)
    is_given = recipe.statistics is not None and Need.STATISTICS in chosen.needs
    if recipe.statistics is not None and not is_given:
        terminal.note(f"note: --statistics is not used: the criterion {chosen.name} needs none")
    if recipe.weighting != "none" and Need.STATISTICS not in chosen.needs:
        terminal.note(f"note: --weighting is not used: the criterion {chosen.name} needs no statistics")
    runs = request is not None or bool(recipe.update) or Need.GRADIENTS in chosen.needs
    runs = runs or (Need.STATISTICS in chosen.needs and not is_given)
    spent = {
        "--precision": recipe.precision != "model",
        "--num-calibration-samples": recipe.num_calibration_samples is not None and not runs,
        "--padding-mask": recipe.padding_mask is not None and not runs,
    }
    for flag in (flag for flag, is_spent in spent.items() if is_spent and is_given):
        terminal.note(f"note: {flag} is not used: the statistics were taken already")
    announce(source, terminal, is_calibrated=runs)
    options: dict[str, Any] = merged(source, vars(recipe))
    return compile_pruned(
        source.model,
        source.example_inputs,
        **selection,
        calibration=source.calibration if source.calibration else None,
        loss_fn=source.loss_fn,
        statistics=recipe.statistics,
        cache=args.cache,
        padding_mask=recipe.padding_mask or source.padding_mask,
        num_calibration_samples=recipe.num_calibration_samples,
        precision=recipe.precision,
        weighting=recipe.weighting,
        keep_gradients=len(sparsities(args.sparsity)) > 1,
        progress=progress,
        tokens=request_of(recipe),
        method=recipe.method,
        flops=recipe.flops,
        method_options=recipe.method_options,
        evaluate=source.evaluate,
        **options,
    )
