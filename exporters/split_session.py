"""Running the parts of a divided model in onnxruntime, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from mfcompile.errors import InputError
from mfcompile.exporters.split_manifest import Part, SplitManifest, check_files, manifest_path
from mfcompile.session import open_session

Feeds = Mapping[str, Any]


class SplitSession:
    """The parts of a model behind the methods of one ``onnxruntime.InferenceSession``.

    Only the parts that the asked outputs need are run, and none whose values are fed. So an image is encoded once and
    used for many texts by feeding what came out of the vision part::

        model = mfcompile.load_parts("pruned")
        features = model.run(["vision_features"], {"pixel_values": pixels})[0]
        scores = [model.run(["logits"], {"vision_features": features, "input_ids": ids})[0] for ids in texts]

    Attributes:
        manifest: the parts, what they read and what they give.
        parts: name -> session of its file.
    """

    def __init__(self, manifest: SplitManifest, parts: Mapping[str, onnxruntime.InferenceSession]) -> None:
        self.manifest = manifest
        self.parts = dict(parts)

    def get_inputs(self) -> list[Any]:
        """Inputs of the whole model, as onnxruntime describes them."""
        found = {node.name: node for session in self.parts.values() for node in session.get_inputs()}
        return [found[name] for name in self.manifest.inputs]

    def get_outputs(self) -> list[Any]:
        """Outputs of the whole model, as onnxruntime describes them."""
        found = {node.name: node for session in self.parts.values() for node in session.get_outputs()}
        return [found[name] for name in self.manifest.outputs]

    def get_modelmeta(self) -> Any:
        """What the last part says of itself; all parts say the same of the whole model."""
        return self.parts[self.manifest.parts[-1].name].get_modelmeta()

    def run(self, output_names: Sequence[str] | None, input_feed: Feeds, run_options: Any = None) -> list[Any]:
        """Outputs as NumPy arrays, like ``InferenceSession.run``.

        Args:
            output_names: outputs of the model, or values that parts hand on ("vision_features"); None: the model's outputs.
            input_feed: name -> array; inputs of the model, or values that parts hand on, in place of running these parts.
            run_options: as in onnxruntime.

        Raises:
            InputError: a name is unknown, or an input is missing (names the part that needs it).
        """
        return self._run(output_names, input_feed, lambda session, names, feeds: session.run(names, feeds, run_options))

    def run_with_ort_values(self, output_names: Sequence[str] | None, input_dict: Feeds, run_options: Any = None) -> list[Any]:
        """Outputs as OrtValues, like ``InferenceSession.run_with_ort_values``; arguments and errors are those of ``run``."""
        return self._run(
            output_names, input_dict, lambda session, names, feeds: session.run_with_ort_values(names, feeds, run_options)
        )

    def _run(
        self,
        output_names: Sequence[str] | None,
        feeds: Feeds,
        call: Callable[[onnxruntime.InferenceSession, list[str], dict[str, Any]], list[Any]],
    ) -> list[Any]:
        wanted = list(self.manifest.outputs if output_names is None else output_names)
        self._check_names(wanted, feeds)
        values = dict(feeds)
        for part, names in self._schedule(wanted, feeds):
            own = {item.name: values[item.name] for item in part.inputs}
            values.update(zip(names, call(self.parts[part.name], names, own), strict=True))
        return [values[name] for name in wanted]

    def _schedule(self, wanted: Sequence[str], feeds: Feeds) -> list[tuple[Part, list[str]]]:
        """The parts to run, in order, each with the outputs that are needed of it."""
        needed = set(wanted) - set(feeds)
        chosen: list[tuple[Part, list[str]]] = []
        for part in reversed(self.manifest.parts):
            names = [item.name for item in part.outputs if item.name in needed]
            if not names:
                continue
            chosen.append((part, names))
            for item in part.inputs:
                if item.name in feeds:
                    continue
                if item.part is None:
                    raise InputError(
                        f"the part {part.name} needs the input {item.name} to give {', '.join(names)}. Feed it, or feed "
                        f"these, or ask for other outputs"
                    )
                needed.add(item.name)
        return chosen[::-1]

    def _check_names(self, wanted: Sequence[str], feeds: Feeds) -> None:
        given = [item.name for part in self.manifest.parts for item in part.outputs]
        for name in wanted:
            if name not in given and name not in feeds:
                raise InputError(f"no part gives {name!r}; they give {', '.join(given)}")
        known = {*self.manifest.inputs, *given}
        for name in feeds:
            if name not in known:
                raise InputError(
                    f"the model has no input {name!r}; its inputs are {', '.join(self.manifest.inputs)}, and parts hand on "
                    f"{', '.join(given)}"
                )


def load_parts(path: Path | str, *, check: bool = True, threads: int | None = None, library: str | None = None) -> SplitSession:
    """Load a model that was exported with ``split="regions"``, to be run in onnxruntime on the CPU.

    Args:
        path: the directory, or its model.split.json.
        check: hold every file to the hash in the manifest first.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        library: path of a library of custom operators to register (``mfcompile.runtime.library_path()``), None for stock
            onnxruntime.

    Returns:
        A session with the methods of ``onnxruntime.InferenceSession`` that the parts need.

    Raises:
        InputError: there is no manifest, a file is missing or is not the one that the manifest describes, or
            onnxruntime cannot load it.
    """
    return open_parts(path, lambda file: open_session(file, threads, library), check=check)


def open_parts(
    path: Path | str, open_file: Callable[[Path], onnxruntime.InferenceSession], *, check: bool = True
) -> SplitSession:
    """Load a split model from sessions of its files; see ``load_parts``.

    Args:
        path: the directory, or its model.split.json.
        open_file: gives the session of one .onnx file.
        check: hold every file to the hash in the manifest first.
    """
    found = manifest_path(path)
    manifest = SplitManifest.load(found)
    if check:
        check_files(manifest, found.parent)
    sessions = {part.name: open_file(found.parent / part.files[0].file) for part in manifest.parts}
    for part in manifest.parts:
        _check_interface(part, sessions[part.name], found)
    return SplitSession(manifest, sessions)


def _check_interface(part: Part, session: onnxruntime.InferenceSession, path: Path) -> None:
    """Refuse a file that does not have the inputs and outputs of its part.

    Raises:
        InputError: names both.
    """
    for what, nodes, items in (("inputs", session.get_inputs(), part.inputs), ("outputs", session.get_outputs(), part.outputs)):
        own, told = [node.name for node in nodes], [item.name for item in items]
        if own != told:
            raise InputError(
                f"{path.with_name(part.files[0].file)} has the {what} {', '.join(own)}, but {path.name} says "
                f"{', '.join(told)}. Export the model again"
            )
