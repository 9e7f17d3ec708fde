"""The command line itself: how it is parsed, and how it helps the one who mistypes."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, cast

from mfcompile._version import __version__
from mfcompile.recipe import FORMATS, SPLITS, VALUES

DESCRIPTION = """\
Prune a vision-language model once, without gradients and without naming it, and export it to ONNX.

mfcompile records the model as a graph, follows the image and the text through it to find which weights
serve vision, text or their fusion, ranks the weights of each by the information that flows through
them (MULTIFLOW), and writes a smaller file that stock onnxruntime loads."""

EXAMPLES = """\
start here:
  mfcompile inspect model.py                    what was captured, which weights serve what, and why
  mfcompile prune model.py --dry-run            what would be pruned; nothing is written
  mfcompile prune model.py --sparsity 0.63      prune, export, compare with PyTorch, report
  mfcompile compare model.py                    which pruner suits this model

a model.py defines:
  model            an nn.Module (or build_model(), which returns one)
  example_inputs   a dict of keyword arguments of forward, a tuple, or a tensor
  and, if you like: calibration_batches, evaluate(model), loss_fn(model, batch), criterion, modalities, regions,
  padding_mask

exit status:
  0 done    1 a check failed (parity, a recipe that was not reproduced)    2 a mistake in the request, or Ctrl-C"""

SOURCE_HELP = "a model.py, a .pt2 archive, an .onnx file, or a Hugging Face model directory (config.json and safetensors)"


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one message and a hint, and whose options may not be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and what may have been meant, and exit with status 2."""
        hints = [hint for hint in (_swallowed(message), _bare_source(message)) if hint]
        self._leave(message, hints)

    def refuse(self, words: Sequence[str], command: str | None) -> NoReturn:
        """Refuse words that no option took, naming the nearest options of the command."""
        parser = self._command(command) if command else self
        options = sorted(option for option in parser._option_string_actions if option.startswith("--"))
        unknown = [word.partition("=")[0] for word in words if word.startswith("-")]
        near = {word: difflib.get_close_matches(word, options, n=1, cutoff=0.6) for word in unknown}
        meant = [f"{hits[0]} instead of {word}" for word, hits in near.items() if hits]
        parser._leave(f"unrecognized arguments: {' '.join(words)}", [f"Did you mean {', '.join(meant)}?"] if meant else [])

    def _command(self, name: str) -> Parser:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return cast(Parser, action.choices[name])
        raise KeyError(name)

    def _leave(self, message: str, hints: Sequence[str]) -> NoReturn:
        self.exit(2, "\n".join([f"error: {message}", *hints, f"See {self.prog} --help."]) + "\n")


def _swallowed(message: str) -> str | None:
    """Where SOURCE is missing, it may have been taken for one of a list of patterns."""
    if "required: " in message and "SOURCE" in message:
        return "Put SOURCE first: options such as --ignore take every word that follows them."
    return None


def _bare_source(message: str) -> str | None:
    """Where the command is missing and a file was given instead."""
    if "COMMAND: invalid choice: " not in message:
        return None
    word = message.split("'")[1]
    return f"Did you mean: mfcompile prune {word}" if Path(word).exists() else None


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 32, "width": 110, **kwargs})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Options without their snake_case spellings, which work all the same."""
        shown = [option for option in action.option_strings if "_" not in option]
        if len(shown) == len(action.option_strings):
            return super()._format_action_invocation(action)
        spellings = action.option_strings
        action.option_strings = shown
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


def build_parser(commands: Mapping[str, Callable[[Subparsers], None]]) -> Parser:
    """The parser of the ``mfcompile`` command.

    Args:
        commands: name -> a function that adds the parser of that sub-command.
    """
    parser = Parser(prog="mfcompile", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"mfcompile {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=Parser)
    for add in commands.values():
        add(subparsers)
    return parser


def add_region_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is pruned and in which region."""
    group = parser.add_argument_group(
        "what is pruned",
        "A PATTERN is an exact parameter name, the path of a submodule, a glob (text_encoder.*), re:REGEX,\n"
        "  a class name (Linear), or region:NAME. One that matches nothing is an error.",
    )
    group.add_argument(
        "--targets",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help="prune only these weights (default: the linear weights inside repeated blocks)",
    )
    group.add_argument(
        "--ignore", nargs="+", action="extend", metavar="PATTERN", help="leave these weights dense (default: none)"
    )
    add_override_options(group)
    group.add_argument(
        "--padding-mask",
        "--padding_mask",
        metavar="NAME",
        help="the input that marks padding with 0, so that padding is not counted (default: found by name and shape)",
    )


def add_calibration_options(group: argparse._ArgumentGroup) -> None:
    """The options that say what statistics are taken from."""
    group.add_argument(
        "--num-calibration-samples",
        "--num_calibration_samples",
        type=whole_number,
        metavar="N",
        help="stop calibrating at the batch that reaches N samples (default: all that the source gives)",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="PATH",
        help="calibration data: an .npz file of arrays named like the inputs, a directory of such files, or a Python file that "
        "defines calibration_batches (default: what the source gives)",
    )
    group.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="calibration statistics of an earlier run of this model (statistics.safetensors), to be used again",
    )
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="calibrate anew, and keep no statistics for later runs (default: those of the same model and data are reused)",
    )


def add_override_options(group: argparse._ArgumentGroup) -> None:
    """The options that overrule what dataflow found."""
    group.add_argument(
        "--regions",
        nargs="+",
        action="extend",
        type=pair("PATTERN=REGION"),
        metavar="PATTERN=REGION",
        help="put weights into a region, over what dataflow found: 'text_encoder.*=text'",
    )
    group.add_argument(
        "--modality",
        dest="modalities",
        nargs="+",
        action="extend",
        type=pair("NAME=MODALITY"),
        metavar="NAME=MODALITY",
        help="say what an input is: pixel_values=vision, input_ids=text, attention_mask=control",
    )


def add_format_options(group: argparse._ArgumentGroup) -> None:
    """The options that say how the ONNX file is stored."""
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="packed stores only the kept weights; dense stores every zero; onnx-sparse stores an int64 index for each kept "
        "weight, the specification's own form, which is larger than dense below a sparsity of two thirds (default: packed)",
    )
    group.add_argument(
        "--inline",
        action="store_true",
        default=None,
        help="decode packed weights by plain nodes only, for runtimes that refuse model-local functions (OpenVINO); the "
        "kernels of mfcompile.runtime cannot skip zeros in such a file",
    )
    group.add_argument(
        "--load-budget",
        "--load_budget",
        type=fraction,
        metavar="X",
        help="memory that stock onnxruntime may take to load a packed file, in multiples of the dense tensors; for less, "
        "more is stored (default: 8, which every encoding fits)",
    )
    group.add_argument(
        "--external-data",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep weights in a file beside the .onnx file, or in it (default: beside it where sparse layers store over 64 MB, "
        "which then are not held in memory twice, and over 1.5 GB)",
    )
    group.add_argument(
        "--values",
        choices=VALUES,
        help="precision of the stored pruned weights, the rest stays as it is; int8 computes every linear layer in int8, "
        "pruned or not, with activations quantized as they come (default: fp32)",
    )
    group.add_argument(
        "--split",
        choices=SPLITS,
        help="regions writes one file per modality and one for their fusion, with model.split.json, which says how they "
        "chain (default: one file)",
    )


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """``--debug``, which every command has."""
    parser.add_argument("--debug", action="store_true", help="show the full traceback and all warnings on an error")


def pair(form: str) -> Callable[[str], tuple[str, str]]:
    """A reader of ``NAME=VALUE``; the last ``=`` separates, so that a regular expression may hold others."""

    def read(text: str) -> tuple[str, str]:
        name, separator, value = text.rpartition("=")
        if not (separator and name and value):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form {form}")
        return name, value

    return read


def whole_number(text: str) -> int:
    """A reader of integers, with a message of its own."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def fraction(text: str) -> float:
    """A reader of a sparsity; ``63%`` is answered with what it should be."""
    try:
        return float(text)
    except ValueError:
        percent = text.removesuffix("%")
        hint = f". Did you mean {float(percent) / 100:g}?" if percent != text and percent.isdigit() else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 0.63{hint}") from None
