"""``mfcompile verify``: does an ONNX file compute what the PyTorch model computes?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mfcompile.cli.console import Terminal
from mfcompile.cli.loading import capture_masked, load
from mfcompile.cli.parser import SOURCE_HELP, Subparsers, add_debug_option
from mfcompile.errors import InputError, ParityError
from mfcompile.exporters.split_manifest import MANIFEST
from mfcompile.recipe import VALUES

if TYPE_CHECKING:
    from mfcompile.masks import MaskSet

DESCRIPTION = """\
Run an ONNX file in onnxruntime and the PyTorch model with its masks on the same held-out inputs, and compare every
output. The tolerance is stated; the exit status is 1 where an output is outside of it."""

EXAMPLES = """\
examples:
  mfcompile verify model-pruned/model.onnx model.py --masks model-pruned/masks.safetensors
  mfcompile verify model-fp16.onnx model.py --masks model-pruned/masks.safetensors
  mfcompile verify model-parts model.py --masks model-pruned/masks.safetensors      the parts of a split model, chained
  mfcompile verify dense.onnx model.py                  a file that was not pruned"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare an ONNX file with PyTorch",
        usage="mfcompile verify ONNX SOURCE [--masks FILE] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("onnx", metavar="ONNX", type=Path, help="the .onnx file, or the directory of a split model")
    parser.add_argument("source", metavar="SOURCE", type=Path, help=SOURCE_HELP)
    parser.add_argument("--masks", type=Path, metavar="FILE", help="the masks that the file was pruned with (default: none)")
    parser.add_argument(
        "--values", choices=VALUES, help="precision of its stored values, which sets the tolerance (default: as it says)"
    )
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile verify``."""
    if not args.onnx.is_file() and not (args.onnx / MANIFEST).is_file():
        raise InputError(f"there is no ONNX file {args.onnx}. The arguments are: mfcompile verify ONNX SOURCE")
    from mfcompile.cli import tables
    from mfcompile.masks import MaskSet
    from mfcompile.report import parity_rows

    masks = MaskSet.load(args.masks) if args.masks else None
    metadata = read_metadata(args.onnx)
    _check_masks(args, masks, metadata.get("mfcompile.masks_sha256", ""))
    values = args.values or metadata.get("mfcompile.values", "fp32")
    with terminal.progress() as progress:
        model = capture_masked(load(args.source, progress), masks, progress, metadata)
        with progress.stage("verify"):
            from mfcompile.exporting import verify

            parity = verify(args.onnx, model, values=values)
    terminal.out.print(tables.parity_table(parity_rows(parity)))
    for note in parity.notes:
        terminal.say(f"note: {note}")
    if not parity.passed:
        wrong = dict.fromkeys(item.name for report in parity.reports for item in report.outputs if not item.within)
        beside = (args.onnx if args.onnx.is_dir() else args.onnx.parent) / "masks.safetensors"
        hint = f" If the file is pruned, pass its masks: --masks {beside}" if args.masks is None else ""
        raise ParityError(
            f"{args.onnx} does not compute what {args.source} computes: {', '.join(wrong)} outside of the tolerance.{hint}"
        )
    terminal.say(f"{args.onnx} agrees with {args.source}: largest difference {parity.max_abs_diff:.2e}.")
    return 0


def read_metadata(path: Path) -> dict[str, str]:
    """What an ONNX file, or the manifest of a split model, says about itself; empty for a file that other tools wrote.

    Raises:
        InputError: it is neither.
    """
    if path.is_dir() or path.suffix == ".json":
        from mfcompile.exporters.split_manifest import SplitManifest

        return {f"mfcompile.{key}": value for key, value in SplitManifest.load(path).storage.items()}
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise InputError(f"{path} cannot be read as an ONNX file ({type(error).__name__}: {error})") from error
    return {item.key: item.value for item in model.metadata_props}


def _check_masks(args: argparse.Namespace, masks: MaskSet | None, digest: str) -> None:
    """Refuse masks that are not those the file was pruned with.

    Raises:
        InputError: names both digests.
    """
    if masks is not None and digest and masks.digest() != digest:
        raise InputError(
            f"{args.onnx} was pruned with masks {digest[:16]}…, but {args.masks} holds masks {masks.digest()[:16]}…. "
            f"Give the masks of the same run"
        )
