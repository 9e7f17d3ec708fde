"""Sessions of files with packed weights: with the sparse kernels, or with weights that are decoded here instead of there.

Stock onnxruntime decodes a packed file by folding constants, and holds every intermediate of every weight until the last one is
folded: several times the memory of the dense model. ``load_session`` decodes one weight at a time into a temporary file of
external data, which onnxruntime maps as it maps a dense model's, so that loading takes what the dense file takes. Files that
need no decoding are mapped themselves (``mfcompile.mapped_tensors``).
"""

from __future__ import annotations

import io
import logging
import shutil
import tempfile
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mfcompile.errors import InputError, RuntimeLibraryError

if TYPE_CHECKING:
    import onnxruntime

    from mfcompile.exporters.split_session import SplitSession
    from mfcompile.exporters.unpacking import PackedFile

logger = logging.getLogger(__name__)

Runtime = bool | str
"""Whether sparse kernels are used: "auto", True or False."""

MAPPING_VERSION = (1, 22)
"""The first onnxruntime that takes models as bytes with external data everywhere."""

_DATA = "weights.data"
_REGISTERED: weakref.WeakSet[Any] = weakref.WeakSet()


def unpack(path: Path | str, output: Path | str, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write the dense ONNX file that a packed one stands for, complete or not at all, with one weight in memory at a time.

    Its weights and other tensors are those of an export with ``format="dense"``, bit for bit and under the same names.

    Args:
        path: a packed .onnx file, of whatever encodings and nodes; its external data lies beside it.
        output: the .onnx file to write; tensors of more than 1.5 GB go to ``<output>.data``.
        overwrite: replace a file that is there.

    Returns:
        The files that were written.

    Raises:
        InputError: there is no packed weight in the file, it was changed since its export, or the output cannot be written.
        ExportError: writing failed, or the result does not pass onnx.checker.
    """
    from mfcompile.exporters.unpacking import unpack_onnx

    return unpack_onnx(Path(path), Path(output), overwrite=overwrite)


def load_session(
    path: Path | str,
    *,
    threads: int | None = None,
    runtime: Runtime = "auto",
    session_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
) -> onnxruntime.InferenceSession | SplitSession:
    """A session of any ONNX file that mfcompile wrote, loaded with little memory, and fast where that is possible.

    Where the file has SparseLinear nodes and the sparse runtime is there, their weights stay packed and its kernels run. All
    other packed weights are decoded one at a time into a temporary file as large as they are (in the folder that ``tempfile``
    chooses; set TMPDIR for another), which onnxruntime maps and which is gone when this returns; where that folder lacks the
    space, they are decoded into memory that onnxruntime borrows, and loading takes up to twice the dense model's memory. Which
    way was taken, and why, is logged to ``mfcompile.loading`` at INFO. Tensors of a file that needs no decoding are mapped from
    it, also where they lie inside of the .onnx file: leave it as it is while the session lives (replacing it is harmless).

    Args:
        path: an .onnx file; or the directory of a split model, or its manifest.
        threads: threads inside one operator; None leaves the choice to onnxruntime.
        runtime: "auto" uses the sparse runtime where file and machine allow it, True insists on it, False does without.
        session_options: options to start from; they are used, not copied, and take ``threads`` if it is given. None is
            ``mfcompile.session_options`` without memory patterns, which hold a second set of buffers and were no faster.
        providers: as in onnxruntime; None is the CPU.

    Returns:
        The session; of a split model one with the same methods (see ``mfcompile.load_parts``).

    Raises:
        InputError: there is no such file, it was changed since its export, onnxruntime cannot load it, or there is no room for
            decoded weights and ``session_options`` are given.
        RuntimeLibraryError: ``runtime=True``, and there is no library; says why.
    """
    if runtime not in ("auto", True, False):
        raise InputError(f'runtime={runtime!r} is not known; choose "auto", True or False')
    path = Path(path)
    opener = _Opener(threads, runtime, session_options, providers)
    if path.is_dir() or path.suffix == ".json":
        from mfcompile.exporters.split_session import open_parts

        return open_parts(path, opener.open)
    return opener.open(path)


@dataclass(frozen=True)
class _Opener:
    """Opens files in one way; see ``load_session`` for the attributes."""

    threads: int | None
    runtime: Runtime
    session_options: onnxruntime.SessionOptions | None
    providers: Sequence[Any] | None

    def open(self, path: Path) -> onnxruntime.InferenceSession:
        """A session of one .onnx file."""
        from mfcompile.exporters.stored_weights import DOMAIN
        from mfcompile.onnx_wire import read_head
        from mfcompile.session_options import release_free_memory

        head = read_head(path)
        options = self._options()
        library = self._find_library(path, wanted=DOMAIN in head.opsets)
        if library is not None:
            _register(options, library)
        session = self._open(path, head.metadata, options, library)
        if library is not None:
            from mfcompile.runtime import release_unused_memory

            release_unused_memory()
        release_free_memory()
        return session

    def _open(
        self, path: Path, metadata: dict[str, str], options: onnxruntime.SessionOptions, library: str | None
    ) -> onnxruntime.InferenceSession:
        from mfcompile.exporters.stored_weights import WEIGHTS_KEY, read_weights

        if WEIGHTS_KEY not in metadata:
            logger.info("%s: loaded as it is: it names no packed weights", path)
            return self._create_mapped(path, options, ())
        weights = read_weights(metadata, path)
        decoded = [fqn for fqn, stored in weights.items() if library is None or not stored.is_sparse]
        if library is not None:
            logger.info("%s: %d weights stay packed for %s", path, len(weights) - len(decoded), library)
        if not decoded:
            sparse = {name for stored in weights.values() if stored.is_sparse for name in stored.tensors}
            return self._create_mapped(path, options, sparse)
        from mfcompile.exporters.unpacking import read_packed

        file = read_packed(path)
        with tempfile.TemporaryDirectory(prefix="mfcompile-", ignore_cleanup_errors=True) as folder:
            model, given = _decode(file, decoded, Path(folder))
            del file  # nothing of it is needed beside onnxruntime
            if given and self.session_options is not None:
                raise InputError(
                    f"{path} cannot be loaded with these session_options: {Path(folder).parent} has no room for its decoded "
                    f"weights, and options cannot be taken again once they hold them. Name another folder in TMPDIR"
                )
            if given:
                options.add_external_initializers(list(given), list(given.values()))
            session = self._create(path, model, options)
        session._mfcompile_initializers = given  # onnxruntime reads their memory and does not own it
        return session

    def _options(self) -> onnxruntime.SessionOptions:
        from mfcompile.session_options import session_options

        if self.session_options is None:
            options = session_options(self.threads)
            options.enable_mem_pattern = False
            return options
        if self.threads is not None:
            self.session_options.intra_op_num_threads = self.threads
        return self.session_options

    def _find_library(self, path: Path, *, wanted: bool) -> str | None:
        """Path of the sparse runtime where it is to be used.

        Raises:
            RuntimeLibraryError: it is insisted on, and there is none.
        """
        if self.runtime is False or not (wanted or self.runtime is True):
            reason = "runtime=False" if self.runtime is False else "no layer of it is sparse"
            logger.info("%s: without the sparse runtime: %s", path, reason)
            return None
        from mfcompile.runtime import library_path

        try:
            library = library_path()
        except RuntimeLibraryError as error:
            if self.runtime is True:
                raise
            logger.info("%s: without the sparse runtime: %s", path, error)
            return None
        return library if wanted else None

    def _create_mapped(
        self, path: Path, options: onnxruntime.SessionOptions, anywhere: Collection[str]
    ) -> onnxruntime.InferenceSession:
        """A session of a file that needs no decoding; its tensors are mapped from it where onnxruntime does that.

        ``anywhere``: see ``mapped_model``.
        """
        from mfcompile.mapped_tensors import FOLDER_KEY, mapped_model

        place = path.resolve()  # onnxruntime refuses external data behind a link that leaves its folder
        model = mapped_model(place, anywhere) if _maps_models() else None
        if model is not None:
            options.add_session_config_entry(FOLDER_KEY, str(place.parent))
            try:
                session = self._create(path, model, options)
            except InputError as error:
                logger.info("%s: its tensors are read, not mapped: %s", path, error)
            else:
                logger.info("%s: its tensors are mapped", path)
                return session
        return self._create(path, str(path), options)

    def _create(self, path: Path, model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        import onnxruntime

        from mfcompile.session_options import load_error

        try:
            return onnxruntime.InferenceSession(model, options, providers=list(self.providers or ["CPUExecutionProvider"]))
        except Exception as error:
            raise load_error(path, error) from error


def _register(options: onnxruntime.SessionOptions, library: str) -> None:
    """Register the sparse runtime, once for each object of options: onnxruntime refuses a domain that comes twice."""
    if options not in _REGISTERED:
        options.register_custom_ops_library(library)
        _REGISTERED.add(options)


def _maps_models() -> bool:
    """Whether onnxruntime reads external data of a model that is given as bytes also where it folds constants."""
    import onnxruntime

    return tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= MAPPING_VERSION


def _decode(file: PackedFile, fqns: Sequence[str], folder: Path) -> tuple[str | bytes, dict[str, Any]]:
    """The model with these weights dense: a file in the folder, or bytes and the values that belong to them.

    Args:
        file: changed.
        fqns: the weights to decode.
        folder: where the file goes if there is room for it.
    """
    from mfcompile.exporters.onnx_files import plan_files, write_files, write_model
    from mfcompile.exporters.unpacking import make_dense

    make_dense(file, fqns, is_folded=True)
    layout = plan_files(file.model, _DATA)
    free = shutil.disk_usage(folder).free
    if free > layout.size_bytes:
        logger.info("%s: %d weights decoded one at a time, through a file in %s", file.path, len(fqns), folder.parent)
        write_files(layout, folder / "model.onnx", folder / _DATA)
        return str(folder / "model.onnx"), {}
    logger.info(
        "%s: %d weights decoded into memory: %s has room for %d bytes, and %d are needed",
        file.path, len(fqns), folder.parent, free, layout.size_bytes,
    )  # fmt: skip
    buffer = io.BytesIO()
    write_model(layout, buffer)
    return buffer.getvalue(), {stored.name: _ort_value(stored.tensor) for stored in layout.tensors if stored.offset is not None}


def _ort_value(tensor: Any) -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(tensor.numpy()), int(tensor.dtype))
