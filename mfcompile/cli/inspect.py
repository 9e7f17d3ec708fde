"""``mfcompile inspect``: what was captured, which weights serve what, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli.console import StageProgress, Terminal
from mfcompile.cli.inspect_tables import describe_units
from mfcompile.cli.loading import capture_source, load, merged, region_options
from mfcompile.cli.parser import SOURCE_HELP, Subparsers, add_debug_option, add_region_options
from mfcompile.cli.token_options import describe_sites, sites_tables
from mfcompile.errors import InputError

if TYPE_CHECKING:
    from mfcompile.graph import CapturedGraph
    from mfcompile.region import RegionMap

DESCRIPTION = """\
Capture a model and show what mfcompile understands of it: what every input was taken for, what each region
holds, the region of every linear weight with the dataflow that decided it, what is shared, what stays dense and
why. Nothing is pruned and nothing is written, except for --json and --picture.

A model whose weights have no values (built on the meta device, or --no-weights for a model directory) is
inspected all the same: a config of many billion parameters takes seconds and no memory."""

PICTURES = (".svg", ".png", ".pdf")

EXAMPLES = """\
examples:
  mfcompile inspect model.py
  mfcompile inspect model.py --picture regions.svg --all
  mfcompile inspect ./llava-13b --no-weights --json regions.json
  mfcompile inspect model.py --tokens --units           where tokens can be cut, and channels and heads removed
  mfcompile inspect model.py --modality x=vision y=text --regions 'bridge.*=fusion'"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "inspect",
        help="show regions, evidence and what stays dense",
        usage="mfcompile inspect SOURCE [--picture FILE] [--json FILE] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=SOURCE_HELP)
    parser.add_argument(
        "--no-weights",
        dest="weights",
        action="store_false",
        help="build a Hugging Face directory from its config.json alone, without reading or holding weights",
    )
    parser.add_argument(
        "--tokens", action="store_true", help="list where tokens can be cut, what stays there, and why not elsewhere"
    )
    parser.add_argument(
        "--units", action="store_true", help="list the hidden channels and heads that can be removed, and why others cannot"
    )
    add_region_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--picture", metavar="FILE", type=Path, help="draw inputs, stacks and heads coloured by region (.svg, .png or .pdf)"
    )
    output.add_argument("--all", dest="everything", action="store_true", help="list every weight; fold no equal layers")
    output.add_argument("--json", metavar="FILE", help="write everything as JSON; - for stdout, instead of the tables")
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile inspect``."""
    if args.picture is not None and args.picture.suffix not in PICTURES:
        raise InputError(f"--picture {args.picture}: the suffix chooses the format; use one of {', '.join(PICTURES)}")
    with terminal.progress() as progress:
        source = load(args.source, progress, weights=args.weights)
        captured, regions = capture_source(source, region_options(args), progress)
        further = _further(captured, merged(source, region_options(args))["modalities"], args, progress)
    view = {**describe(captured, regions), **further}
    text = json.dumps(view, indent=2, ensure_ascii=False)
    if args.json == "-":
        terminal.say(text)
        return 0
    for note in source.notes:
        terminal.note(f"note: {note}")
    _show(view, terminal, everything=args.everything)
    if args.picture is not None:
        terminal.say(f"wrote {_draw(captured, regions, args.picture)}")
    if args.json:
        from mfcompile.files import write_atomically

        terminal.say(f"wrote {write_atomically(Path(args.json), (text + chr(10)).encode())}")
    return 0


def _further(
    captured: CapturedGraph, modalities: Mapping[str, str] | None, args: argparse.Namespace, progress: StageProgress
) -> dict[str, Any]:
    """Token sites and structural units, where they are asked for: both are of the model's exported program."""
    found: dict[str, Any] = {}
    if args.tokens:
        from mfcompile.tokens import find_token_sites

        with progress.stage("tokens"):
            found["token_sites"] = describe_sites(find_token_sites(captured, modalities=modalities))
    if args.units:
        from mfcompile.structure import find_units

        with progress.stage("units"):
            found["units"] = describe_units(find_units(captured, modalities=modalities))
    return found


def _draw(captured: CapturedGraph, regions: RegionMap, path: Path) -> Path:
    import io

    from mfcompile.files import write_atomically
    from mfcompile.passes.block_graph import block_graph
    from mfcompile.region_plot import plot_regions

    pruned = regions.pruned_sites
    subtitle = (
        f"{len(pruned):,} of {len(regions.sites):,} linear weights would be pruned: "
        f"{sum(site.weight_count for site in pruned):,} of "
        f"{sum(parameter.numel() for parameter in captured.module.parameters()):,} parameters"
    )
    buffer = io.BytesIO()
    plot_regions(
        block_graph(captured, regions),
        buffer,
        format=path.suffix[1:],
        title=type(captured.module).__name__,
        subtitle=subtitle,
    )
    return write_atomically(path, buffer.getvalue())


def describe(captured: CapturedGraph, regions: RegionMap) -> dict[str, Any]:
    """Everything that is known before calibration, as JSON."""
    from mfcompile.report import describe_plan

    return {
        "format": "mfcompile.inspection",
        "format_version": 1,
        "model": type(captured.module).__name__,
        **describe_plan(captured, regions),
        "regions": _regions(regions),
        "weights": [_weight(site, regions) for site in regions.sites],
    }


def _regions(regions: RegionMap) -> list[dict[str, Any]]:
    """One row per region, pruned or not, in order of first appearance."""
    rows: dict[str, dict[str, Any]] = {}
    blocks: dict[str, set[str]] = {}
    for site in regions.sites:
        row = rows.setdefault(
            site.region,
            {"region": site.region, "weights": 0, "elements": 0, "pruned_weights": 0, "pruned_elements": 0, "blocks": 0},
        )
        row["weights"] += 1
        row["elements"] += site.weight_count
        if site.skipped is None:
            row["pruned_weights"] += 1
            row["pruned_elements"] += site.weight_count
        found = {use.block for use in regions.evidence.get(site.fqn, ()) if use.block is not None}
        blocks.setdefault(site.region, set()).update(found)
    for region, row in rows.items():
        row["blocks"] = len(blocks[region])
    return list(rows.values())


def _weight(site: Any, regions: RegionMap) -> dict[str, Any]:
    uses = regions.evidence.get(site.fqn, ())
    blocks = [use for use in uses if use.block is not None]
    return {
        "name": site.name,
        "region": site.region,
        "shape": [site.out_features, site.in_features],
        "weights": site.weight_count,
        "reason": site.skipped,
        "override": regions.overrides.get(site.fqn),
        "tied_with": list(site.tied_with),
        "label": sorted({label for use in uses for label in use.label}),
        "block": blocks[0].block if blocks else None,
        "block_label": sorted({label for use in blocks for label in use.block_label}),
        "uses": [
            {
                "node": use.node,
                "activation": use.activation,
                "rows": list(use.rows),
                "label": sorted(use.label),
                "block": use.block,
                "block_label": sorted(use.block_label),
                "module": use.stack[-1] if use.stack else "",
            }
            for use in uses
        ],
    }


def _show(view: dict[str, Any], terminal: Terminal, *, everything: bool) -> None:
    from mfcompile.cli import inspect_tables, tables

    out = terminal.out
    out.print(tables.attempts_table(view))
    for text in view["capture"]["specialised"]:
        terminal.say(f"  specialised: {text}")
    out.print(tables.inputs_table(view))
    out.print(inspect_tables.weights_table(view, everything=everything))
    for found in (
        inspect_tables.shared_table(view, everything=everything),
        tables.skipped_table(view),
        inspect_tables.diagnostics_table(view, everything=everything),
    ):
        if found is not None:
            out.print(found)
    out.print(inspect_tables.regions_table(view))
    if "token_sites" in view:
        for found in sites_tables(view["token_sites"]):
            out.print(found)
    if "units" in view:
        for found in inspect_tables.units_tables(view["units"]):
            out.print(found)
    pruned = [weight for weight in view["weights"] if weight["reason"] is None]
    terminal.say(
        f"{len(pruned)} of {len(view['weights'])} linear weights would be pruned, "
        f"{sum(weight['weights'] for weight in pruned):,} elements. Next: mfcompile prune with --dry-run"
    )
