"""Saving a stripped module so that its own library reloads it without mfcompile."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from mfcompile.files import umask


def save_weights(module: nn.Module, directory: Path) -> None:
    """Write ``model.safetensors`` (and the configuration, where the module can write its own) into a directory.

    A module with ``save_archive`` (a program of torch.export) also writes ``model.pt2``. One with ``save_pretrained`` writes
    itself. Any other gives its parameters and persistent buffers under their
    own names; a tied weight is stored once, under its first name, and the other names are listed in the metadata. Extra
    state that is no tensor is left out.

    Args:
        module: a module without masks in force (see ``strip``).
        directory: an existing directory.
    """
    if callable(getattr(module, "save_archive", None)):
        module.save_archive(directory / "model.pt2")  # type: ignore[operator]
    if callable(getattr(module, "save_pretrained", None)):
        module.save_pretrained(directory)  # type: ignore[operator]
        _share_like_other_files(directory)
        return
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {"format": "pt"}
    storages: set[int] = set()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):  # a module's extra state: safetensors holds tensors only
            continue
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            metadata[name] = first[key]
            continue
        first[key] = name
        stored = tensor.detach().cpu().contiguous()
        # The format knows no views: what shares memory with another tensor is written in full for each of them.
        address = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if address in storages else stored
        storages.add(address)
    save_file(tensors, directory / "model.safetensors", metadata=metadata)
    _share_like_other_files(directory)


def _share_like_other_files(directory: Path) -> None:
    """safetensors writes files that only their owner may read; give them the mode that the umask gives any new file."""
    mode = 0o666 & ~umask()
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)
