"""ONNX graphs written by hand, and their parts run one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper

from mfcompile.artifact import ExportedArtifact
from mfcompile.exporters.split_build import ModelPart, SplitModel, split_model
from mfcompile.exporters.split_files import write_split
from mfcompile.exporters.split_session import SplitSession, load_parts
from mfcompile.split import SplitRequest

MODALITIES = {"pixels": "vision", "ids": "text", "words": "text", "sound": "audio", "mask": None}
SIZES = {"batch": 2, "sequence": 5}


def graph(signature: str, body: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """A model from ONNX's own text form.

    Args:
        signature: "(inputs) => (outputs)".
        body: its nodes.
        weights: name -> shape of a random float initializer.
    """
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> g {signature} {{ {body} }}')
    random = np.random.default_rng(0)
    for name, shape in weights.items():
        values = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for node in [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value_ints"]:
        values = np.array(node.attribute[0].ints, np.int64)  # shape inference reads initializers only
        model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def split(
    model: onnx.ModelProto, regions: Mapping[str, str] | None = None, modalities: Mapping[str, str | None] = MODALITIES
) -> SplitModel:
    return split_model(ir.from_proto(model), SplitRequest(modalities, regions or {}, SIZES))


def operators(divided: SplitModel) -> dict[str, list[str]]:
    """Part -> its operators in order, without the Shapes that ask for sizes."""
    return {part.name: [node.op_type for node in part.model.graph] for part in divided.parts}


def interface(divided: SplitModel) -> dict[str, tuple[list[str], list[str]]]:
    """Part -> names of its inputs and of its outputs."""
    return {
        part.name: ([str(v.name) for v in part.model.graph.inputs], [str(v.name) for v in part.model.graph.outputs])
        for part in divided.parts
    }


def stored(divided: SplitModel) -> dict[str, set[str]]:
    """Part -> names of its float initializers."""
    return {
        part.name: {name for name, value in part.model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
        for part in divided.parts
    }


def save_part(part: ModelPart, path: Path) -> ExportedArtifact:
    proto = ir.to_proto(part.model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return ExportedArtifact(path, "dense", "fp32", path.stat().st_size, 0, (), (), (), {}, (path,), 18, 0)


def chain(divided: SplitModel, folder: Path, modalities: Mapping[str, str | None] = MODALITIES) -> SplitSession:
    write_split(divided, folder / "parts", modalities, save_part)
    return load_parts(folder / "parts")


def run_whole(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> dict[str, Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    known = {node.name for node in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def feeds(batch: int = 3, sequence: int = 6, seed: int = 1) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "pixels": random.normal(size=(batch, 4, 8)).astype(np.float32),
        "sound": random.normal(size=(batch, 3, 8)).astype(np.float32),
        "words": random.normal(size=(batch, sequence, 8)).astype(np.float32),
        "ids": random.integers(0, 10, (batch, sequence)),
        "mask": random.integers(0, 2, (batch, sequence)).astype(np.float32),
    }


def assert_chain_equals_whole(model: onnx.ModelProto, divided: SplitModel, folder: Path) -> SplitSession:
    """The parts give what the whole gives, at two sizes."""
    session = chain(divided, folder)
    names = [node.name for node in session.get_outputs()]
    assert names == [value.name for value in model.graph.output]
    for given in (feeds(), feeds(batch=1, sequence=4, seed=2)):
        expected = run_whole(model, given)
        own = {node.name: given[node.name] for node in session.get_inputs()}
        for name, found in zip(names, session.run(None, own), strict=True):
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    return session
