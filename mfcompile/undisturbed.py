"""Running a model for a look at what it computes, and leaving it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.control_flow import eager_code, run_eagerly
from mfcompile.module_copy import KeptState


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run the module inside in eval mode, operator by operator, without autograd.

    Afterwards every submodule has its training mode back, and parameters and buffers hold what they held. What the run
    keeps in plain attributes (caches) stays; a copy of the module (``share_weights_copy``) takes these.

    Args:
        module: the module that will run.
    """
    # A frozen TorchScript module has no such attribute.
    training = [item for item in module.modules() if getattr(item, "training", False)]
    mode = KeepingState(module)
    for item in training:
        item.training = False
    try:
        with eager_code(), torch.inference_mode(), mode:
            yield
    finally:
        for item in training:
            item.training = True
        mode.state.restore()


class KeepingState(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no __init_subclass__
    """Copies what a run is about to write into parameters and buffers; ``state.restore()`` puts it back."""

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = KeptState(module)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return run_eagerly(func, args, kwargs, self, "the model")
        self.state.before(func, args, kwargs)
        return func(*args, **kwargs)
