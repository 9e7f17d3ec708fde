"""``mfcompile bench``: one pruned model in all its forms, run in turns on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli import benchmark_tables
from mfcompile.cli.console import StageProgress, Terminal
from mfcompile.cli.loading import capture_masked, load
from mfcompile.cli.parser import Subparsers, add_debug_option, whole_number
from mfcompile.errors import InputError

if TYPE_CHECKING:
    from mfcompile.benchmark.result import Benchmark

DESCRIPTION = """\
Measure one pruned model on this machine in every form it has: the dense file and the packed file in stock onnxruntime, the
packed file decoded by mfcompile.load_session, the packed file with the sparse runtime, and int8. All forms run in turns in
one process, so that what else the machine does slows them alike; memory and loading are measured in a process for each. It
says what it found, also where sparse loses."""

EXAMPLES = """\
examples:
  mfcompile bench model-pruned                              the model.onnx of a pruned directory
  mfcompile bench model.onnx --tokens 1,8,32,197 --threads 1,2 -o measured
  mfcompile bench model.py --masks model-pruned/masks.safetensors --batch 1,8
  mfcompile bench model.onnx --variants dense,runtime --inputs samples.npz --tokens inputs

exit status: 0 measured, also where a form is missing or slower; 2 nothing could be measured"""

SOURCE_HELP = (
    "a pruned .onnx file, packed or dense; a directory that mfcompile prune wrote; with --masks, a model.py and its like"
)

AS_INPUTS = "inputs"


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a pruned model dense, packed, with the sparse runtime and in int8",
        usage="mfcompile bench MODEL [--tokens N,...] [--batch N,...] [--threads N,...] [-o DIR] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="MODEL", type=Path, help=SOURCE_HELP)
    parser.add_argument(
        "--masks", type=Path, metavar="FILE", help="the masks.safetensors of a pruned directory, for a model.py"
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--variants",
        type=_names,
        metavar="NAME,...",
        help="forms: dense, packed, decoded, runtime, int8, int8-runtime (default: all; one that there is none of is listed "
        "with the reason)",
    )
    what.add_argument(
        "--tokens",
        type=_tokens,
        metavar="N,...",
        help="lengths of the sequence dimensions that the graph leaves free, or the word inputs for those of the inputs "
        "(default: 1,8,32,197)",
    )
    what.add_argument("--batch", type=_numbers, metavar="N,...", help="batch sizes (default: 1)")
    what.add_argument(
        "--threads", type=_numbers, metavar="N,...", help="threads inside one operator (default: 1 and all cores, up to 8)"
    )
    what.add_argument(
        "--rounds",
        type=whole_number,
        metavar="N",
        help="how often every form has its turn at every size (default: as fits into about six seconds)",
    )
    what.add_argument(
        "--inputs",
        type=Path,
        metavar="PATH",
        help="an .npz file of arrays named like the inputs, for an .onnx file (default: random ones, made from their types)",
    )
    what.add_argument("--no-cost", dest="cost", action="store_false", help="leave out memory, loading and first run")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output-dir",
        "--output_dir",
        type=Path,
        metavar="DIR",
        help="write bench.json, bench.png and bench.svg into this directory (default: write nothing)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace the output directory if there is one")
    output.add_argument("--json", action="store_true", help="print the JSON on stdout instead of tables")
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile bench``."""
    if args.output_dir is not None:
        from mfcompile.cli.outputs import check_directory

        check_directory(args.output_dir, overwrite=args.overwrite)
    with terminal.progress() as progress:
        found = _bench(args, progress)
        if args.output_dir is not None:
            with progress.stage("write"):
                found.save(args.output_dir, overwrite=args.overwrite)
    document = found.as_dict()
    if args.json:
        import json

        terminal.say(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    show(document, args.output_dir, terminal)
    return 0


def show(document: dict[str, Any], directory: Path | None, terminal: Terminal) -> None:
    """The benchmark as tables and plain sentences.

    Args:
        document: what ``Benchmark.as_dict`` returned.
        directory: what was written into; None where nothing was.
        terminal: where it is printed.
    """
    terminal.out.print(benchmark_tables.speed_table(document))
    terminal.out.print(benchmark_tables.cost_table(document))
    for line in benchmark_tables.findings(document):
        terminal.say(line)
    terminal.say(benchmark_tables.machine_line(document))
    for note in document["notes"]:
        terminal.say(f"note: {note}")
    if directory is not None:
        terminal.say(f"Wrote {', '.join(str(directory / name) for name in ('bench.json', 'bench.png', 'bench.svg'))}")


def _bench(args: argparse.Namespace, progress: StageProgress) -> Benchmark:
    is_file = args.source.suffix == ".onnx" or (args.source / "model.onnx").is_file()
    if args.masks is None and not is_file:
        raise InputError(
            f"{args.source} is no pruned .onnx file and no directory with a model.onnx. Give its masks, --masks "
            f"DIR/masks.safetensors, or prune it first: mfcompile prune {args.source}"
        )
    if args.masks is not None and is_file:
        raise InputError(f"{args.source} is an .onnx file, which holds its zeros itself: leave out --masks")
    if args.inputs is not None and not is_file:
        raise InputError(f"{args.source} brings its own example inputs: leave out --inputs")
    from mfcompile.benchmark.bench import bench

    inputs = None if args.inputs is None else _read_inputs(args.inputs)
    if is_file:
        model: Any = args.source
    else:
        from mfcompile.masks import MaskSet

        model = capture_masked(load(args.source, progress), MaskSet.load(args.masks), progress)
    return bench(
        model,
        inputs,
        variants=args.variants,
        batch=args.batch or (1,),
        tokens=args.tokens,
        threads=args.threads,
        rounds=args.rounds,
        cost=args.cost,
        progress=progress,
    )


def _read_inputs(path: Path) -> dict[str, Any]:
    """The first batch of calibration data."""
    from mfcompile.frontends.calibration_files import load_calibration

    return dict(next(iter(load_calibration(path)())))


def _numbers(text: str) -> tuple[int, ...]:
    """A reader of whole numbers, separated by commas."""
    return tuple(whole_number(word) for word in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    """A reader of names, separated by commas."""
    return tuple(word.strip() for word in text.split(","))


def _tokens(text: str) -> tuple[int, ...]:
    """A reader of lengths; empty for the word ``inputs``."""
    return () if text == AS_INPUTS else _numbers(text)
