"""Which submodule is running: paths of the calls, kept by hooks while a model runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from mfcompile.graph import ModuleCall


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch every submodule to eval mode for the duration of the block."""
    # A frozen TorchScript module has no such attribute.
    training = [item for item in module.modules() if getattr(item, "training", False)]
    for item in training:
        item.training = False
    try:
        yield
    finally:
        for item in training:
            item.training = True


class ReportsCalls(nn.Module):
    """A module that runs without calling its submodules, and says itself which of them runs."""

    tracker: ModuleTracker | None = None

    def report(self, calls: tuple[ModuleCall, ...]) -> None:
        """These submodules of mine run now, outermost first (the module itself among them)."""
        if self.tracker is not None:
            self.tracker.stack[:] = calls


@dataclass
class ModuleTracker:
    """The stack of submodule calls that are running."""

    names: dict[int, str]
    stack: list[ModuleCall] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    raised: tuple[BaseException | None, str] = (None, "")

    def enter(self, module: nn.Module) -> None:
        """A submodule starts."""
        path = self.names.get(id(module))
        if path is None:
            return
        call = self.counts.get(path, 0)
        self.counts[path] = call + 1
        self.stack.append(ModuleCall(path, call))

    def leave(self, module: nn.Module) -> None:
        """A submodule returned or raised."""
        path = self.names.get(id(module))
        error = sys.exc_info()[1]
        if error is not None and error is not self.raised[0]:
            self.raised = (error, self.describe())
        if path is not None and self.stack and self.stack[-1].path == path:
            self.stack.pop()

    def describe(self) -> str:
        """Name of the innermost running submodule, for messages."""
        return self.stack[-1].path or "the model itself" if self.stack else "the model itself"

    def where_raised(self, error: BaseException) -> str:
        """Name of the innermost submodule that let ``error`` out, for messages."""
        return self.raised[1] if error is self.raised[0] else self.describe()


@contextlib.contextmanager
def track_modules(module: nn.Module, tracker: ModuleTracker) -> Iterator[None]:
    """Keep ``tracker.stack`` up to date while submodules of ``module`` run."""
    if isinstance(module, ReportsCalls):
        module.tracker = tracker
        try:
            yield
        finally:
            del module.tracker
        return
    handles = []
    for item in module.modules():
        if isinstance(item, torch.jit.ScriptModule):
            continue
        handles.append(item.register_forward_pre_hook(lambda mod, _: tracker.enter(mod), prepend=True))
        handles.append(item.register_forward_hook(lambda mod, _, __: tracker.leave(mod), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_names(module: nn.Module) -> dict[int, str]:
    """id of every submodule -> its first name."""
    return {id(item): name for name, item in module.named_modules()}
