"""``mfcompile compare``: several pruners on one model, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli import comparison_tables, tables
from mfcompile.cli.console import StageProgress, Terminal
from mfcompile.cli.loading import announce, load_recipe, merged, region_options
from mfcompile.cli.parser import (
    Subparsers,
    add_calibration_options,
    add_debug_option,
    add_region_options,
    whole_number,
)
from mfcompile.cli.pruning_options import read_allocation, sparsities, sparsity
from mfcompile.errors import InputError
from mfcompile.recipe import Recipe

if TYPE_CHECKING:
    from mfcompile.comparison_result import Comparison
    from mfcompile.frontends.sources import ModelSource
    from mfcompile.passes.variants import Variant

DESCRIPTION = """\
Prune a model with several pruners, on one capture and one calibration, and show which suits it: the model's own
evaluate, the error of its outputs against the dense model, the sparsity of every region and of the least and the most
pruned layer, and how far the masks agree. Nothing is exported; without -o nothing is written.

A PRUNER is one word:  CRITERION[,OPTION=VALUE...][@ALLOCATION][:PATTERN][+UPDATE[,OPTION=VALUE...]]
  multiflow                    as published
  multiflow@score-global       one threshold over all scores: the paper's "without distribution"
  multiflow@magnitude-global   budgets from all layers together: the paper's "without multimodality"
  multiflow-inverted           the paper's "inversion"
  wanda:2:4                    a pattern; it sets its own sparsity
  magnitude@uniform:4x1        the same from every layer, in blocks
  multiflow+sparsegpt          weights that stay are rewritten; least-squares, gradual: see docs/recipes.md
  itersnip,steps=20            an option of the criterion
  multiflow@budgets.yaml       PATTERN: SPARSITY per layer, from a file"""

EXAMPLES = """\
examples:
  mfcompile compare model.py                             every criterion that needs no gradients, at 0.63, 0.75 and 0.9
  mfcompile compare model.py --criteria multiflow magnitude lamp wanda --sparsity 0.5 0.63 0.75 -o compared
  mfcompile compare model.py --criteria multiflow multiflow@score-global multiflow@magnitude-global multiflow-inverted
  mfcompile compare model.py --criteria wanda:2:4 magnitude:2:4 multiflow:2:4 --metric accuracy
  mfcompile compare model.py --sparsity vision=0.5,text=0.7,fusion=0.6

The last calibration batches are held out of calibration to compare outputs on, one in eight, where there are eight or more.
Criteria that need gradients take loss_fn(model, batch) from model.py. Random scores are the floor of every comparison."""

SOURCE_HELP = "a model.py, a Hugging Face model directory, a .pt2 archive or an .onnx file"


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "compare",
        help="try several pruners on a model and show which suits it",
        usage="mfcompile compare SOURCE [--criteria PRUNER ...] [--sparsity S ...] [-o DIR] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=SOURCE_HELP)
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--criteria",
        nargs="+",
        action="extend",
        metavar="PRUNER",
        help="the pruners, see above (default: every criterion that needs no gradients, and snip where model.py has a loss_fn)",
    )
    what.add_argument(
        "--sparsity",
        nargs="+",
        action="extend",
        type=sparsity,
        metavar="S",
        help="fractions of the weights to remove, in [0, 1), or REGION=S,REGION=S (default: 0.63 0.75 0.9)",
    )
    what.add_argument("--no-floor", dest="floor", action="store_false", help="leave random scores out, where not named")
    what.add_argument(
        "--metric",
        metavar="NAME[:max|:min]",
        help="the metric of evaluate that ranks (default: its first); max or min says which way is better (default: the way "
        "in which the pruned model with the largest output error is worse than the dense one)",
    )
    what.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="do not run the model's own evaluate")
    what.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of everything random (default: 0)")
    data = parser.add_argument_group("calibration")
    add_calibration_options(data)
    data.add_argument(
        "--held-out",
        "--held_out",
        type=whole_number,
        metavar="N",
        help="keep the last N batches from calibration, to compare outputs on; 0 compares on calibration data, and masks are "
        "those of mfcompile prune (default: one in eight)",
    )
    add_region_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output-dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="write compare.json, compare.png and compare.svg into this directory (default: write nothing)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the output directory if there is one")
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile compare``."""
    wanted = sparsities(args.sparsity)
    if args.output_dir is not None:
        from mfcompile.cli.outputs import check_directory

        check_directory(args.output_dir, overwrite=args.overwrite)
    named = None if args.criteria is None else [_read(word) for word in args.criteria]
    with terminal.progress() as progress:
        source = load_recipe(Recipe(source=args.source, calibration=args.calibration), progress)
        variants = _variants(named, source, args)
        announce(source, terminal)
        terminal.note(f"{args.source}: {', '.join(variant.label for variant in variants)}")
        found = _compare(source, variants, wanted, args, progress)
        if args.output_dir is not None:
            with progress.stage("write"):
                found.save(args.output_dir, overwrite=args.overwrite)
    show(found.as_dict(), args.source, args.output_dir, terminal, _shared_options(args))
    return 0


def show(
    document: dict[str, Any], source: Path, directory: Path | None, terminal: Terminal, options: Sequence[str] = ()
) -> None:
    """The comparison as tables and plain sentences.

    Args:
        document: what ``Comparison.as_dict`` returned.
        source: the model.
        directory: what was written into; None where nothing was.
        terminal: where it is printed.
        options: words of the command line that the command which follows needs too.
    """
    terminal.out.print(comparison_tables.results_table(document))
    for line in comparison_tables.explanation(document):
        terminal.say(line)
    more = comparison_tables.further_metrics(document)
    if more:
        terminal.say(f"Further metrics: {', '.join(more)}; " + ("see compare.json" if directory else "-o DIR writes them"))
    for line in tables.note_lines(document["diagnostics"]):
        terminal.say(line)
    terminal.out.print()
    terminal.out.print(comparison_tables.agreement_table(document["agreement"][document["middle"]]))
    if directory is not None:
        terminal.say(f"Wrote {', '.join(str(directory / name) for name in ('compare.json', 'compare.png', 'compare.svg'))}")
    following = comparison_tables.next_step(document, source, options)
    if following is not None:
        terminal.say(following)


def _shared_options(args: argparse.Namespace) -> list[str]:
    """The options that were given and mean the same to ``mfcompile prune``."""
    words: list[str] = []
    of_data = ("calibration", "statistics", "num_calibration_samples", "padding_mask", "seed")
    for name in (*of_data, "targets", "ignore", "regions", "modalities"):
        value = getattr(args, name)
        if value:
            items = value if isinstance(value, list) else [value]
            flag = "modality" if name == "modalities" else name.replace("_", "-")
            words += [f"--{flag}", *("=".join(item) if isinstance(item, tuple) else str(item) for item in items)]
    return words


def _read(word: str) -> dict[str, Any]:
    """A pruner from its word; an allocation that is a file is read. A name that model.py may bring is looked up later.

    Raises:
        InputError: the word or the file is not valid.
    """
    from mfcompile.passes.criteria.registry import names
    from mfcompile.passes.variants import parse_word, read_variant

    parts = parse_word(word)
    allocation = parts.get("allocation")
    if allocation is not None and allocation.endswith((".yaml", ".yml", ".json")):
        parts["allocation"] = read_allocation(Path(allocation))
    if parts["criterion"] in names():
        read_variant(parts)
    return parts


def _variants(named: Sequence[Any] | None, source: ModelSource, args: argparse.Namespace) -> list[Variant]:
    from mfcompile.passes.criteria.base import Pruner
    from mfcompile.passes.variants import read_variants

    own = source.criterion
    if own is not None and not isinstance(own, Pruner):
        raise InputError(
            f"`criterion` in {source.path} is a {type(own).__name__}, not a Criterion object. Make a subclass of "
            f"mfcompile.Criterion and assign an object of it, or rename the variable"
        )
    return read_variants(named, has_loss=source.loss_fn is not None, own=own, floor=args.floor)


def _compare(
    source: ModelSource,
    variants: Sequence[Variant],
    wanted: Sequence[Any],
    args: argparse.Namespace,
    progress: StageProgress,
) -> Comparison:
    from mfcompile.comparison import DEFAULT_SPARSITIES, compare

    options = region_options(args)
    found = compare(
        source.model,
        source.example_inputs,
        criteria=variants,
        sparsities=wanted or DEFAULT_SPARSITIES,
        calibration=source.calibration,
        evaluate=source.evaluate if args.evaluate else None,
        metric=args.metric,
        loss_fn=source.loss_fn,
        held_out=args.held_out,
        floor=False,
        statistics=args.statistics,
        cache=args.cache,
        padding_mask=options.get("padding_mask") or source.padding_mask,
        num_calibration_samples=args.num_calibration_samples,
        seed=args.seed,
        progress=progress,
        **merged(source, options),
    )
    return replace(found, source={"path": source.path.name, "kind": source.kind})
