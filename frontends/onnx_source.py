"""An .onnx file as a source on the command line."""

from __future__ import annotations

from pathlib import Path

from mfcompile.frontends.sources import ModelSource


def load_onnx(path: Path) -> ModelSource:
    """The file as a module that onnxruntime runs; it brings no inputs and no calibration data.

    Raises:
        InputError: the file is damaged, incomplete, or not valid ONNX.
    """
    from mfcompile.onnx_file import OnnxFile

    return ModelSource(model=OnnxFile(path).eval(), example_inputs=None, path=path, kind="onnx")
