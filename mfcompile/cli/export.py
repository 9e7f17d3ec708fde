"""``mfcompile export``: apply saved masks to a model and write it as ONNX."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli.console import StageProgress, Terminal
from mfcompile.cli.loading import capture_masked, load, merged, region_options
from mfcompile.cli.parser import SOURCE_HELP, Subparsers, add_debug_option, add_format_options, add_override_options
from mfcompile.errors import InputError

if TYPE_CHECKING:
    from mfcompile.artifact import ExportedArtifact, ParityReport
    from mfcompile.graph import CapturedGraph

DESCRIPTION = """\
Apply the masks that an earlier run saved, write the model as ONNX, and compare it with the masked PyTorch
model. The model must be the one that the masks were made for: its fingerprint is checked."""

EXAMPLES = """\
examples:
  mfcompile export model.py --masks model-pruned/masks.safetensors -o model-fp16.onnx --values fp16
  mfcompile export ./blip-itm --masks blip-63/masks.safetensors -o blip-dense.onnx --format dense
  mfcompile export ./blip-itm --masks blip-63/masks.safetensors -o blip-parts --split regions"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "export",
        help="write a model with saved masks as ONNX",
        usage="mfcompile export SOURCE --masks FILE -o PATH [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help=SOURCE_HELP)
    parser.add_argument("--masks", type=Path, required=True, metavar="FILE", help="the masks.safetensors of a pruned directory")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, required=True, metavar="PATH", help="the .onnx file to write; with --split, the directory"
    )
    output.add_argument("--overwrite", action="store_true", help="replace it if there is one")
    add_format_options(output)
    add_override_options(parser.add_argument_group("what is split where, with --split"))
    add_debug_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Run ``mfcompile export``."""
    from mfcompile.cli.outputs import check_writable
    from mfcompile.masks import MaskSet

    target: Path = args.output
    if args.split is None and target.suffix != ".onnx":
        raise InputError(f"the output {target} does not end in .onnx. Give the file to write, such as {target.name}.onnx")
    is_taken = any(target.iterdir()) if args.split and target.is_dir() else target.exists()
    if is_taken and not args.overwrite:
        raise InputError(f"the output {target} exists already. Nothing was written; choose another, or pass --overwrite")
    check_writable(target, option="-o")
    masks = MaskSet.load(args.masks)
    with terminal.progress() as progress:
        source = load(args.source, progress)
        pruned = capture_masked(source, masks, progress)
        storage = {"format": args.format or "packed", "values": args.values or "fp32", "inline": bool(args.inline)}
        storage |= {"load_budget": args.load_budget, "external_data": args.external_data}
        if args.split:
            artifact, parity = _write_parts(pruned, target, storage, merged(source, region_options(args)), progress)
        else:
            artifact, parity = _write(pruned, target, storage, progress)
    from mfcompile.cli import results, tables
    from mfcompile.report import parity_rows, with_export

    export = with_export({}, artifact)["export"]
    for line in (*results.size_lines(export), *results.sparse_lines(export)):
        terminal.say(line)
    terminal.out.print()
    if artifact.parts:
        terminal.out.print(tables.parts_table(export))
    terminal.out.print(tables.parity_table(parity_rows(parity)))
    for file in artifact.files:
        written = target / file.name if artifact.parts else target.with_name(file.name)
        terminal.say(f"wrote {written} ({tables.size(written.stat().st_size)})")
    return 0


def _write_parts(
    pruned: CapturedGraph, target: Path, storage: Mapping[str, Any], options: Mapping[str, Any], progress: StageProgress
) -> tuple[ExportedArtifact, ParityReport]:
    """Write the parts and verify them in a directory beside the target; they move there when they agree with PyTorch.

    Raises:
        ParityError: they do not; nothing is left.
    """
    import tempfile

    from mfcompile.exporters.parity import raise_on_failure
    from mfcompile.exporters.split_files import check_directory, publish_parts
    from mfcompile.exporting import export_onnx, verify
    from mfcompile.steps import infer_regions

    check_directory(target)
    regions = infer_regions(pruned, **options)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        with progress.stage("onnx"):
            parts = Path(folder) / "parts"
            artifact = export_onnx(pruned, parts, split="regions", regions=regions, **storage)
        with progress.stage("verify"):
            parity = verify(artifact, pruned)
            raise_on_failure(parity)
        publish_parts(parts, target)
    return artifact, parity


def _write(
    pruned: CapturedGraph, target: Path, storage: Mapping[str, Any], progress: StageProgress
) -> tuple[ExportedArtifact, ParityReport]:
    """Write and verify in a directory beside the target, and move the files when they agree with PyTorch.

    Raises:
        ParityError: they do not; nothing is left.
    """
    import os
    import tempfile

    from mfcompile.exporters.parity import raise_on_failure
    from mfcompile.exporting import export_onnx, verify

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        with progress.stage("onnx"):
            artifact = export_onnx(pruned, Path(folder) / target.name, **storage)
        with progress.stage("verify"):
            parity = verify(artifact, pruned)
            raise_on_failure(parity)
        for file in sorted(artifact.files, key=lambda file: file == artifact.path):  # the .onnx file last
            os.replace(file, target.with_name(file.name))
    return artifact, parity
