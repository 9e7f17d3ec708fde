"""model.split.json: which files a divided model consists of, and how they chain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mfcompile._version import __version__
from mfcompile.errors import InputError
from mfcompile.files import write_atomically

MANIFEST = "model.split.json"
FORMAT, FORMAT_VERSION = "mfcompile.split", 1

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class TensorSpec:
    """An input or an output of a part.

    Attributes:
        name: its name in the part's file, and in the whole model.
        dtype: NumPy's name of the element type.
        shape: sizes; a free dimension has a name, equal names are equal sizes. None: unknown rank.
        part: for an input: the part that gives it; None: the caller does. For an output: None.
        modality: for an input of the whole model: what it holds; None for control inputs.
    """

    name: str
    dtype: str
    shape: Shape | None
    part: str | None = None
    modality: str | None = None


@dataclass(frozen=True)
class PartFile:
    """One file of a part: its name beside the manifest, its size and its SHA-256."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: "vision", "text", ..., "fusion".
        files: the .onnx file first, then its external data if it has some.
        inputs: what it reads.
        outputs: what it gives: outputs of the whole model, and values for later parts.
    """

    name: str
    files: tuple[PartFile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True)
class SplitManifest:
    """How the parts of a model chain.

    Attributes:
        parts: in running order; a part reads inputs of the model and outputs of earlier parts.
        inputs: names of the whole model's inputs, in order.
        outputs: names of the whole model's outputs, in order.
        storage: how weights are stored, and with which masks ("format", "values", "masks_sha256").
        notes: what is worth knowing of the division.
    """

    parts: tuple[Part, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    storage: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def giver(self, name: str) -> Part | None:
        """The part that gives a value; None for inputs of the model and unknown names."""
        return next((part for part in self.parts for item in part.outputs if item.name == name), None)

    def save(self, directory: Path) -> Path:
        """Write it as JSON, complete or not at all."""
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, "mfcompile": __version__, **asdict(self)}
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        return write_atomically(directory / MANIFEST, (text + "\n").encode())

    @classmethod
    def load(cls, path: Path | str) -> SplitManifest:
        """Read a manifest.

        Args:
            path: the file, or the directory that holds it.

        Raises:
            InputError: there is none, it is damaged, or its parts do not chain.
        """
        path = manifest_path(path)
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise InputError(f"{path} is not the manifest of a split model: it does not say format {FORMAT!r}")
            if document["format_version"] != FORMAT_VERSION:
                raise InputError(
                    f"{path} is of version {document['format_version']}; this version of mfcompile reads {FORMAT_VERSION}"
                )
            manifest = _read(document)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). Export the model again") from error
        problem = next(_problems(manifest), None)
        if problem is not None:
            raise InputError(f"{path}: {problem}. The manifest was changed; export the model again")
        return manifest


def manifest_path(path: Path | str) -> Path:
    """The manifest in a directory, or the path itself.

    Raises:
        InputError: there is no such file.
    """
    path = Path(path)
    found = path / MANIFEST if path.is_dir() else path
    if not found.is_file():
        raise InputError(f"there is no {found.name} at {found.parent}: no split model was published there, or not completely")
    return found


def check_files(manifest: SplitManifest, directory: Path) -> None:
    """Hold every file to the size and the hash in the manifest.

    Raises:
        InputError: names the file that is missing or was changed.
    """
    for part in manifest.parts:
        for file in part.files:
            path = directory / file.file
            if not path.is_file():
                raise InputError(
                    f"the part {part.name} is missing: there is no {path}. Copy all files, or export the model again"
                )
            size = path.stat().st_size
            if size != file.size_bytes or sha256_of(path) != file.sha256:
                raise InputError(
                    f"{path} is not the file that {MANIFEST} describes ({size:,} bytes, {file.size_bytes:,} expected; "
                    f"or another content). Files of two exports were mixed, or it is damaged; export the model again"
                )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(document: Mapping[str, Any]) -> SplitManifest:
    return SplitManifest(
        tuple(
            Part(
                str(part["name"]),
                tuple(PartFile(str(file["file"]), int(file["size_bytes"]), str(file["sha256"])) for file in part["files"]),
                tuple(_read_tensor(item) for item in part["inputs"]),
                tuple(_read_tensor(item) for item in part["outputs"]),
            )
            for part in document["parts"]
        ),
        tuple(map(str, document["inputs"])),
        tuple(map(str, document["outputs"])),
        {str(key): str(value) for key, value in document["storage"].items()},
        tuple(map(str, document["notes"])),
    )


def _read_tensor(item: Mapping[str, Any]) -> TensorSpec:
    shape = None if item["shape"] is None else tuple(item["shape"])
    return TensorSpec(str(item["name"]), str(item["dtype"]), shape, item["part"], item["modality"])


def _problems(manifest: SplitManifest) -> Iterator[str]:
    """Why the parts do not chain."""
    given: dict[str, str] = {}
    if not manifest.parts:
        yield "it names no part"
    for part in manifest.parts:
        if not part.files:
            yield f"the part {part.name} has no file"
        for file in part.files:
            if Path(file.file).name != file.file or file.file in ("", ".", ".."):
                yield f"the part {part.name} has a file {file.file!r} that does not lie beside the manifest"
        for item in part.inputs:
            if item.part is None and item.name not in manifest.inputs:
                yield f"the part {part.name} reads {item.name}, which is no input of the model"
            elif item.part is not None and given.get(item.name) != item.part:
                yield f"the part {part.name} reads {item.name} of {item.part}, which no earlier part gives"
        for item in part.outputs:
            if item.name in given or item.name in manifest.inputs:
                yield f"{item.name} is given twice"
            given[item.name] = part.name
    for name in manifest.outputs:
        if name not in given:
            yield f"no part gives the output {name}"
