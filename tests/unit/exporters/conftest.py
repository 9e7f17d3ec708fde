from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
import pytest

from mfcompile.exporters import conversion, onnx_model
from mfcompile.graph import ExportedModel


@pytest.fixture(scope="session", autouse=True)
def _convert_each_program_once() -> Iterator[None]:
    """The same program converts to the same model; conversions after the first are copies of it, to save minutes."""
    convert = conversion.convert_program
    converted: dict[int, tuple[ExportedModel, bytes]] = {}

    def convert_once(exported: ExportedModel) -> ir.Model:
        if id(exported) not in converted:
            converted[id(exported)] = (exported, ir.to_proto(convert(exported)).SerializeToString())
        return ir.from_proto(onnx.load_from_string(converted[id(exported)][1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_model, "convert_program", convert_once)
        yield
