"""ONNX graphs written by hand, for tests of what comes in as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

B, L, P, WIDTH, HEADS, HIDDEN, WORDS = 2, 6, 4, 16, 2, 24, 50


class GraphWriter:
    """Writes a graph node by node; weights are drawn from a fixed seed."""

    def __init__(self, opset: int = 17, ir_version: int = 8) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.opset, self.ir_version = opset, ir_version
        self._random = np.random.default_rng(0)
        self._count = 0

    def weight(self, name: str, *shape: int) -> str:
        return self.store(name, (self._random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def store(self, name: str, array: NDArray[Any]) -> str:
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def input(self, name: str, dtype: int, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def op(self, op_type: str, *inputs: str, out: str = "", name: str = "", domain: str = "", **attributes: Any) -> str:
        self._count += 1
        out = out or f"value_{self._count}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], name=name, domain=domain, **attributes))
        return out

    def model(self, *outputs: str, rank: int = 2) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "written by hand",
            self.inputs,
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="tests")
        model.ir_version = self.ir_version
        model.metadata_props.add(key="license", value="none")
        return model

    def linear(self, name: str, value: str, outputs: int, inputs: int) -> str:
        """A linear layer with its weight stored (in, out), as most exporters have it."""
        product = self.op("MatMul", value, self.weight(f"{name}.weight", inputs, outputs))
        return self.op("Add", product, self.weight(f"{name}.bias", outputs))

    def heads(self, value: str, order: list[int]) -> str:
        shape = self.store(f"{value}.shape", np.array([0, -1, HEADS, WIDTH // HEADS]))
        return self.op("Transpose", self.op("Reshape", value, shape), perm=order)

    def attention(self, name: str, value: str, context: str, bias: str = "") -> str:
        query, key, given = (
            self.linear(f"{name}.{part}", source, WIDTH, WIDTH)
            for part, source in (("q", value), ("k", context), ("v", context))
        )
        logits = self.op("MatMul", self.heads(query, [0, 2, 1, 3]), self.heads(key, [0, 2, 3, 1]))
        logits = self.op("Add", logits, bias) if bias else logits
        mixed = self.op("MatMul", self.op("Softmax", logits, axis=-1), self.heads(given, [0, 2, 1, 3]))
        shape = self.store(f"{name}.merged", np.array([0, -1, WIDTH]))
        merged = self.op("Reshape", self.op("Transpose", mixed, perm=[0, 2, 1, 3]), shape)
        return self.linear(f"{name}.out", merged, WIDTH, WIDTH)

    def norm(self, name: str, value: str) -> str:
        scale = self.store(f"{name}.weight", np.ones(WIDTH, np.float32))
        return self.op("LayerNormalization", value, scale, self.weight(f"{name}.bias", WIDTH), axis=-1)

    def layer(self, name: str, value: str, bias: str = "", context: str = "") -> str:
        normed = self.norm(f"{name}.norm1", value)
        value = self.op("Add", value, self.attention(f"{name}.attention", normed, normed, bias))
        if context:
            normed = self.norm(f"{name}.norm2", value)
            value = self.op("Add", value, self.attention(f"{name}.cross", normed, context))
        hidden = self.linear(f"{name}.mlp.up", self.norm(f"{name}.norm3", value), HIDDEN, WIDTH)
        hidden = self.op("Relu", hidden)
        return self.op("Add", value, self.linear(f"{name}.mlp.down", hidden, WIDTH, HIDDEN))


def two_towers(opset: int = 17, *, fused: bool = True) -> onnx.ModelProto:
    """An image tower and a text tower of two layers each; with ``fused`` the text layers attend to the image."""
    writer = GraphWriter(opset)
    writer.input("pixel_values", TensorProto.FLOAT, "batch", 3, 8, 8)
    writer.input("input_ids", TensorProto.INT64, "batch", "length")
    writer.input("attention_mask", TensorProto.INT64, "batch", "length")
    kernel = writer.weight("vision.patches.weight", WIDTH, 3, 4, 4)
    patches = writer.op("Conv", "pixel_values", kernel, strides=[4, 4], kernel_shape=[4, 4])
    rows = writer.op("Reshape", patches, writer.store("rows", np.array([0, WIDTH, -1])))
    image = writer.op("Transpose", rows, perm=[0, 2, 1])
    for index in range(2):
        image = writer.layer(f"vision.layers.{index}", image)
    image = writer.norm("vision.norm", image)
    words = writer.op("Gather", writer.weight("text.words.weight", WORDS, WIDTH), "input_ids")
    axes = writer.store("axes", np.array([1, 2]))
    seen = writer.op("Unsqueeze", writer.op("Cast", "attention_mask", to=TensorProto.FLOAT), axes)
    hidden = writer.op("Sub", writer.store("one", np.array(1.0, np.float32)), seen)
    bias = writer.op("Mul", hidden, writer.store("far", np.array(-1e9, np.float32)))
    for index in range(2):
        words = writer.layer(f"text.layers.{index}", words, bias, image if fused else "")
    pooled = writer.op("ReduceMean", words, axes=[1], keepdims=0)
    writer.linear("head", pooled, 3, WIDTH)
    return writer.model(
        writer.op("Identity", writer.nodes[-1].output[0], out="logits"), writer.op("Identity", image, out="image")
    )


def two_towers_inputs(seed: int = 0, batch: int = B) -> dict[str, torch.Tensor]:
    """Inputs of ``two_towers``: the second text is padded."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, L, dtype=torch.long)
    mask[1::2, -2:] = 0
    return {
        "pixel_values": torch.rand(batch, 3, 8, 8, generator=generator),
        "input_ids": torch.randint(5, WORDS, (batch, L), generator=generator) * mask,
        "attention_mask": mask,
    }


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model; with ``external`` all but small tensors lie in a file beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # saving externally changes the model that is saved
    location = f"{path.name}.data" if external else None
    onnx.save(copy, path, save_as_external_data=external, location=location, size_threshold=200)
    return path


def without_names(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The model with numbers in place of all names, without metadata; old name -> new name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names: dict[str, str] = {"": ""}

    def new(name: str) -> str:
        return names.setdefault(name, str(1000 + len(names)))

    graph = copy.graph
    for value in (*graph.input, *graph.initializer):
        value.name = new(value.name)
    for index, node in enumerate(graph.node):
        node.name = str(index)
        del node.metadata_props[:]
        for field in (node.input, node.output):
            renamed = [new(name) for name in field]
            del field[:]
            field.extend(renamed)
    for value in graph.output:
        value.name = new(value.name)
    del graph.value_info[:]
    return copy, names
