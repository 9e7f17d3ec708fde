"""Which submodule of the original model a node of an ONNX file came from, as far as the file tells.

Exporters leave it in one of three places: the metadata of nodes (``pkg.torch.onnx.name_scopes``), the names of nodes
("/encoder/layer.0/attention/MatMul"), or the names of initializers ("encoder.layer.0.attention.query.weight"). Nodes without a
sign of their own lie between nodes that have one, in the innermost submodule that both share.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from torch import nn

from mfcompile.onnx_file import ELEMENT_TYPES

_SCOPES, _CLASSES = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy"

NO_PATHS = "the file names no submodules"

Path = tuple[str, ...]
"""Dotted paths of the submodules around a node, outermost first, the model itself left out."""


@dataclass(frozen=True)
class Scopes:
    """Where nodes came from.

    Attributes:
        source: where that was read, in words; NO_PATHS where it is not known.
        paths: for every node of the graph, the submodules around it.
        modules: path -> class to stand for it.
    """

    source: str
    paths: tuple[Path, ...]
    modules: Mapping[str, type[nn.Module]]


def find_scopes(model: onnx.ModelProto) -> Scopes:
    """The submodules around every node of the main graph."""
    nodes = model.graph.node
    classes: dict[str, str] = {}
    rules = (
        ("submodules are known from the metadata of nodes", [_from_metadata(node, classes) for node in nodes]),
        ("submodules are known from the names of nodes", [_from_node_name(node) for node in nodes]),
        ("submodules are known from the names of initializers", _from_initializers(model.graph)),
    )
    for source, found in rules:
        if _is_telling([path for path in found if path]):
            paths = _fill(nodes, found)
            kinds = {path: _kind(classes.get(path, "")) for stack in paths for path in stack}
            return Scopes(source, paths, kinds)
    return Scopes(NO_PATHS, ((),) * len(nodes), {})


def _is_telling(paths: Sequence[Path | None]) -> bool:
    """Paths that tell parts of the model apart: several, each of several nodes perhaps, and some nested."""
    found = {path for path in paths if path}
    return len(found) > 1 and any(len(path) > 1 for path in found)


def _from_metadata(node: onnx.NodeProto, classes: dict[str, str]) -> Path | None:
    given = {item.key: item.value for item in node.metadata_props if item.key in (_SCOPES, _CLASSES)}
    scopes, kinds = _read_list(given.get(_SCOPES)), _read_list(given.get(_CLASSES))
    if scopes is None:
        return None
    for path, kind in zip(scopes[:-1], kinds or (), strict=False):
        classes.setdefault(path, kind)
    return tuple(dict.fromkeys(path for path in scopes[:-1] if path and not path.startswith(".")))


def _read_list(text: str | None) -> list[str] | None:
    try:
        found = ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return None
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else None


def _from_node_name(node: onnx.NodeProto) -> Path | None:
    parts = [part for part in node.name.split("/")[:-1] if part]
    return _prefixes(".".join(parts)) if parts else None


def _from_initializers(graph: onnx.GraphProto) -> list[Path | None]:
    """The submodule that owns the stored tensors of a node; a tensor that several nodes read is no sign."""
    readers = Counter(name for node in graph.node for name in set(node.input))
    owner = {
        item.name: item.name.rpartition(".")[0]
        for item in graph.initializer
        if len(item.dims) and item.data_type in ELEMENT_TYPES and ELEMENT_TYPES[item.data_type].is_floating_point
    }
    found: list[Path | None] = []
    for node in graph.node:
        owners = [owner[name] for name in node.input if owner.get(name) and readers[name] == 1]
        content = [name for name in node.input if name and name not in owner]
        if owners and not content and len(node.output) == 1:  # a view of a stored tensor belongs where it is read
            owner[node.output[0]] = owners[0]
            found.append(None)
        else:
            found.append(_common(*(_prefixes(item) for item in owners)) if owners else None)
    return found


def _prefixes(path: str) -> Path:
    """ "a.layers.0.b" -> ("a", "a.layers.0", "a.layers.0.b"): a list is never called itself."""
    parts = path.split(".")
    if not all(parts):
        return ()
    return tuple(
        ".".join(parts[:length]) for length in range(1, len(parts) + 1) if length == len(parts) or not parts[length].isdigit()
    )


def _common(*paths: Path) -> Path:
    found: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return tuple(found)


def _fill(nodes: Sequence[onnx.NodeProto], own: Sequence[Path | None]) -> tuple[Path, ...]:
    """Give every node without a sign the innermost submodule that holds its neighbours."""
    made: dict[str, int] = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    before: list[Path | None] = []
    for index, node in enumerate(nodes):
        sources = [made[name] for name in node.input if name in made]
        known = [before[source] for source in sorted(sources, reverse=True) if before[source] is not None]
        before.append(own[index] if own[index] is not None else known[0] if known else None)
    after: list[Path | None] = [None] * len(nodes)
    for index in reversed(range(len(nodes))):
        mine = own[index] if own[index] is not None else after[index]
        for name in nodes[index].input:
            if name in made and mine is not None:
                after[made[name]] = mine  # the first reader in order is met last
    return tuple(
        path if path is not None else _common(before[index] or (), after[index] or ()) for index, path in enumerate(own)
    )


_KINDS: dict[str, type[nn.Module]] = {}


def _kind(name: str) -> type[nn.Module]:
    """A class that stands for the original one, of the same name: equal names are one class."""
    leaf = name.rpartition(".")[2]
    if not leaf.isidentifier():
        return nn.Module
    if name == "torch.nn.modules.container.Sequential":
        return nn.Sequential
    return _KINDS.setdefault(name, type(leaf, (nn.Module,), {}))
