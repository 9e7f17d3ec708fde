"""An ONNX file that can be called like the module it was made from, so that the user's own evaluate can score it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfcompile.exporters.session import make_feeds, open_session, run_session
from mfcompile.inputs import ExampleInputs, normalize_inputs, output_tensors


class OnnxModule(nn.Module):
    """onnxruntime behind the forward of a module; outputs have the module's structure.

    Methods of the module are deliberately not there: calling one would score PyTorch under the name of onnxruntime.

    Args:
        path: the .onnx file.
        like: the module that the file was made from; its plain attributes (a config) can be read.
        example_inputs: inputs to learn the structure of the outputs from.
    """

    def __init__(self, path: Path, like: nn.Module, example_inputs: ExampleInputs) -> None:
        super().__init__()
        self._session = open_session(path)
        self._like = like
        with torch.inference_mode():
            output = example_inputs.call(like)
        names = {id(tensor): name for name, tensor in output_tensors(output).items()}
        leaves, self._structure = pytree.tree_flatten(output)
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._names = [names[id(leaf)] if isinstance(leaf, Tensor) else None for leaf in leaves]

    def __getattr__(self, name: str) -> Any:
        """An own attribute, or a plain one of the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            like = self.__dict__.get("_modules", {}).get("_like")
            value = getattr(like, name) if like is not None else None
            if value is None or callable(value):
                raise AttributeError(f"an ONNX file has only forward, not {name}") from None
            return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's forward takes and gives, computed by onnxruntime."""
        inputs: Any = kwargs or args
        if args and kwargs:
            inputs = dict(inspect.signature(self._like.forward).bind(*args, **kwargs).arguments)
        feeds, _ = make_feeds(self._session, normalize_inputs(self._like, inputs, what="the inputs"))
        found = run_session(self._session, feeds)
        leaves = [
            constant if name is None else found[name if name in found else f"{name}_out"]  # see exporters.onnx_names
            for constant, name in zip(self._constants, self._names, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._structure)
