"""``mfcompile unpack``: the dense ONNX file that a packed one stands for."""

from __future__ import annotations

import argparse
from pathlib import Path

from mfcompile.cli.console import Terminal
from mfcompile.cli.parser import Subparsers, add_debug_option

DESCRIPTION = """\
Write the dense ONNX file that a packed one stands for: the same graph with every zero stored, bit for bit what
--format dense exports. Optimizers, converters and quantizers want that file; what they make of a packed one is larger
than it has to be. One weight at a time is in memory."""

EXAMPLES = """\
examples:
  mfcompile unpack pruned/model.onnx -o dense.onnx
  mfcompile unpack blip-parts/vision.onnx -o vision-dense.onnx --overwrite"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "unpack",
        help="write the dense ONNX file of a packed one",
        usage="mfcompile unpack PACKED -o PATH [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("packed", metavar="PACKED", type=Path, help="a packed .onnx file; its .data file lies beside it")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="the .onnx file to write; large tensors go beside it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace it if there is one")
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile unpack``."""
    from mfcompile.cli import tables
    from mfcompile.cli.outputs import check_writable
    from mfcompile.loading import unpack

    check_writable(args.output, option="-o")
    for file in unpack(args.packed, args.output, overwrite=args.overwrite):
        terminal.say(f"wrote {file} ({tables.size(file.stat().st_size)})")
    return 0
