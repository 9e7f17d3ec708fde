"""A ``.pt2`` archive of torch.export as a model: read without running pickled code, and written again when pruned."""

from __future__ import annotations

import importlib
import io
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from mfcompile.errors import InputError
from mfcompile.frontends.program_module import program_module
from mfcompile.frontends.sources import ModelSource

_TENSOR_CONSTANT = "tensor_"
_KNOWN_TYPES = "transformers."
"""Where output classes may come from that torch only knows once their module is imported."""


def load_pt2(path: Path) -> ModelSource:
    """The model in an archive that ``torch.export.save`` wrote, with the example inputs that it holds, if any.

    The masks, regions and ONNX file are those of the program itself: names are the FQNs of the exported module, blocks come
    from its recorded module paths, and the dimensions that it left free stay free.

    Raises:
        InputError: the file is no such archive, or holds pickled objects.
    """
    _refuse_pickled(path)
    program = _load(path)
    model = program_module(program)
    return ModelSource(
        model=model,
        example_inputs=model.own_inputs(),
        path=path,
        kind="pt2",
        notes=("an archive of torch.export holds no calibration data",),
    )


def _load(path: Path) -> ExportedProgram:
    for module in _modules_of_outputs(path):
        _imported(module)
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # torch logs the traceback of what it raises
    try:
        return torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a file that it cannot read
        reason = _first_line(error.__cause__ or error.__context__ or error)
        raise InputError(
            f"{path} cannot be loaded by torch.export.load ({reason}). An archive of another version of torch must be exported "
            f"again; one of AOTInductor holds compiled code and no graph; an output class that torch does not know needs its "
            f"library: load it in a model.py after importing that"
        ) from error
    finally:
        logger.setLevel(level)


def _modules_of_outputs(path: Path) -> list[str]:
    """Modules of installed libraries that define the classes of the program's inputs and outputs."""
    with zipfile.ZipFile(path) as archive:
        graphs = [json.loads(archive.read(name)) for name in archive.namelist() if re.search(r"/models/[^/]+\.json$", name)]
    specs = []
    for graph in graphs:
        for entry in graph.get("graph_module", {}).get("module_call_graph", ()):
            signature = entry.get("signature") or {}
            specs += [signature.get("in_spec") or "", signature.get("out_spec") or ""]
    found = re.findall(rf"\b({re.escape(_KNOWN_TYPES)}[\w.]+)\.\w+", " ".join(specs))
    return list(dict.fromkeys(found))


def _imported(module: str) -> bool:
    """Import a module of an installed library, so that its output classes are known to torch."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _refuse_pickled(path: Path) -> None:
    """Look into the archive before torch does: torch falls back to unpickling, which can run any code.

    Raises:
        InputError: names the entry.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if _is_pickled(archive, name)), None)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no archive of torch.export ({error}). Write one with torch.export.save") from error
    if pickled is not None:
        raise InputError(
            f"{path} holds a pickled object ({pickled.partition('/')[2] or pickled}): loading it can run any code, so "
            f"mfcompile does not. Load it where you trust it, and save the program again with plain tensors"
        )


def _is_pickled(archive: zipfile.ZipFile, name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder.endswith("data/sample_inputs") and archive.getinfo(name).file_size:
        try:
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception:  # what is refused raises several kinds
            return True
        return False
    if not folder.endswith(("data/weights", "data/constants")):
        return False
    if not file.endswith("config.json"):
        return file.endswith(".pt")  # the form of torch before 2.9: all tensors in one pickle
    entries = json.loads(archive.read(name))["config"].values()
    is_constants = folder.endswith("constants")
    return any(item["use_pickle"] or (is_constants and not item["path_name"].startswith(_TENSOR_CONSTANT)) for item in entries)


def _first_line(error: BaseException) -> str:
    text: Any = str(error).strip() or repr(error)
    return str(text).splitlines()[0].rstrip(".")[:300]
