"""The callback that keeps masks in force under the Trainer of transformers. Importing this module imports transformers."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from torch import nn

from mfcompile.errors import InputError, MaskError
from mfcompile.frontends.unwrapping import unwrap
from mfcompile.masked_weights import masks_of, put_masks
from mfcompile.masks import MaskSet
from mfcompile.training.verification import refuse_foreign_adapters, verify_masks

_Base: Any = object
with contextlib.suppress(ImportError):  # said when somebody makes a callback
    from transformers import TrainerCallback

    _Base = TrainerCallback

_log = logging.getLogger(__name__)


class MaskCallback(_Base):  # type: ignore[misc]
    """Keeps masks in force while the Trainer of transformers trains, and writes them beside every checkpoint.

    A model with masks in force (``compiled.module``, ``mfcompile.load``) trains as it is. One without, a pruned directory that
    ``from_pretrained`` loaded, gets the masks that are given here, in place, before anything is trained.

    Checkpoints hold plain weights with zeros baked in, under the names that transformers gives them, and masks.safetensors:
    ``from_pretrained``, ``resume_from_checkpoint`` and ``mfcompile.load`` all read them. When training ends all masks are
    verified.

    Args:
        masks: the masks, or the path of masks.safetensors; None where they are in force. Their new values are left aside.

    Raises:
        InputError: transformers cannot be imported; or, while the Trainer is built or begins, there are no masks, or they are
            of another model.
        MaskError: adapters of peft sit on masked layers, or pruned weights are not zero.
    """

    def __init__(self, masks: MaskSet | Path | str | None = None) -> None:
        if _Base is object:
            raise InputError(
                "MaskCallback is for the Trainer of transformers, which cannot be imported. "
                "Run: pip install 'mfcompile[transformers]' accelerate"
            )
        self._masks = masks if masks is None or isinstance(masks, MaskSet) else MaskSet.load(masks)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the masks on a model that has none."""
        self._put(_inside(kwargs))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train what has no masks."""
        model = _inside(kwargs)
        self._put(model)
        refuse_foreign_adapters(model)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the masks beside the weights of a checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            masks_of(_inside(kwargs)).save(checkpoint / "masks.safetensors")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what the masks promise."""
        _log.info("%s", verify_masks(_inside(kwargs), self._masks))

    def _put(self, model: nn.Module) -> None:
        own = masks_of(model)
        if self._masks is None:
            if not own:
                raise InputError(
                    f"{type(model).__name__} has no masks in force: train compiled.module or what mfcompile.load gives, or "
                    f"give the masks, MaskCallback('pruned/masks.safetensors')"
                )
        elif not own:
            put_masks(model, self._masks, shared=False)
        elif set(own) != set(self._masks) or any((own[fqn] != self._masks[fqn]).any() for fqn in own):
            raise MaskError(f"{type(model).__name__} has other masks in force than those that MaskCallback was given")


def _inside(kwargs: dict[str, Any]) -> nn.Module:
    return unwrap(kwargs["model"])[0]
