"""An exported program becomes an onnx_ir model whose initializers are the user's parameters."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import torch

from mfcompile.errors import ExportError
from mfcompile.exporters.messages import first_line
from mfcompile.exporters.onnx_files import strip_metadata
from mfcompile.exporters.program import prepare_program
from mfcompile.exporters.simplification import simplify
from mfcompile.exporters.translations import TRANSLATIONS
from mfcompile.graph import ExportedModel

logger = logging.getLogger(__name__)


class RefusedProgramError(ExportError):
    """This program of the model cannot become a right ONNX file; another program of the same model may.

    Attributes:
        reason: why, in a few words, without advice.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


OPSET = 18
OPERATOR = re.compile(r"OpOverload\(op='([^']+)', overload='([^']+)'\)")


def convert_program(exported: ExportedModel) -> ir.Model:
    """The program as a simplified onnx_ir model; its initializers share memory with the user's parameters.

    Raises:
        RefusedProgramError: an operator of the program has no translation (names it).
    """
    model = _convert(exported)
    try:
        simplify(model)
    except Exception as error:  # the graph as converted is as right, only longer
        logger.warning("the ONNX graph is not simplified: %s", first_line(error))
        model = _convert(exported)
    strip_metadata(model)
    return model


def _convert(exported: ExportedModel) -> ir.Model:
    try:
        with _quiet_converter():
            program = torch.onnx.export(
                prepare_program(exported.program),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
    except Exception as error:
        reason, operator = _explain(error)
        subject = f"operator {operator}" if operator else "the model"
        raise RefusedProgramError(
            f"{subject} cannot be converted to ONNX: {reason} (exported by {exported.route}). "
            f"Replace the operator in the model's forward, or capture a part of the model that does without it",
            f"{subject} cannot be converted to ONNX: {reason}",
        ) from error
    assert program is not None  # torch.onnx.export with dynamo=True returns a program
    model: ir.Model = program.model
    return model


def _explain(error: BaseException) -> tuple[str, str]:
    """First line of the innermost cause, and the operator that it names ("" when it names none)."""
    texts = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        texts.append(str(error))
    reason = next((line.strip() for line in texts[-1].splitlines() if line.strip()), type(error).__name__)
    match = next((found for text in reversed(texts) if (found := OPERATOR.search(text))), None)
    return reason.rstrip("."), f"{match[1]}.{match[2]}" if match else ""


@contextmanager
def _quiet_converter() -> Iterator[None]:
    """The converter's progress and its notes on packages that are not installed are not our user's business."""
    converter = logging.getLogger("torch.onnx")
    level = converter.level
    converter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        converter.setLevel(level)
