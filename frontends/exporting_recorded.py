"""Re-export of a recording: what runs once can be exported, with the shapes of the example.

The recording is replayed under torch.export. Python has no part in it any more: branches, loops over sizes and numbers
read from tensors are what they were on the example, so nothing of the model's own code can stop the export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfcompile.frontends.constant_folding import attach, fetch, fold_constants
from mfcompile.frontends.recorder import Recording, record
from mfcompile.frontends.static_sizes import REWRITES
from mfcompile.frontends.traceable import Traceable
from mfcompile.inputs import ExampleInputs

_SEED = 0


@contextlib.contextmanager
def replayed_recording(module: nn.Module, inputs: ExampleInputs) -> Iterator[Traceable]:
    """Record the module anew and give a module that replays it, over the same parameters under the same names.

    Args:
        module: a module of our own, in eval mode and without cache.
        inputs: what it is recorded with.

    Yields:
        The replaying module, and what a user should know of it.
    """
    recording = _record(module, inputs)
    replayed = Replay(fold_constants(recording.graph_module), recording.output_names)
    numbers = _numbers(recording)
    yield Traceable(replayed, _notes(recording), lambda other: _numbers(_record(module, other)) == numbers)


def _record(module: nn.Module, inputs: ExampleInputs) -> Recording:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return record(module, inputs)


def _numbers(recording: Recording) -> list[float]:
    """What the model read from its inputs: the recording is right wherever these are the same."""
    return [scalar.value for scalar in recording.baked_scalars if scalar.from_input]


class Replay(nn.Module):
    """A recorded graph as a module that takes what the user's module takes, and returns its outputs by name.

    Args:
        graph_module: of a recording; its tensors are shared.
        output_names: one per output.
    """

    def __init__(self, graph_module: fx.GraphModule, output_names: tuple[str, ...]) -> None:
        super().__init__()
        self._replayed_graph = graph_module.graph
        self._output_names = output_names
        for node in graph_module.graph.find_nodes(op="get_attr"):
            attach(self, str(node.target), fetch(graph_module, str(node.target)))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Replay on other values."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = _Interpreter(self, graph=self._replayed_graph).run(*tensors)
        return dict(zip(self._output_names, results, strict=True))


class _Interpreter(fx.Interpreter):
    """Runs a recording; operators whose results are as long as the values say get the length that was recorded."""

    def run_node(self, n: fx.Node) -> Any:
        rewrite = REWRITES.get(n.target) if n.op == "call_function" else None
        if rewrite is None:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return rewrite(n.meta.get("val"), *args, **kwargs)


def _notes(recording: Recording) -> tuple[str, ...]:
    read = [scalar for scalar in recording.baked_scalars if scalar.from_input]
    if not read:
        return ("made from the recorded graph: every shape is that of the example",)
    shown = list(dict.fromkeys(scalar.module for scalar in read))
    where = ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
    return (
        f"made from the recorded graph: every shape is that of the example, and {len(read)} numbers that the model reads from "
        f"its inputs (in {where}) are constants. The file is right for inputs that give the same numbers: images of the same "
        f"sizes, placeholders in the same places",
    )
