"""Operators that take functions (``torch.cond``, ``while_loop``, ``scan``, ...), run as plain Python while a mode watches.

A dispatch mode sees such an operator whole, not what its functions do. Run eagerly, the branch that the values choose and
the loop as often as they ask for become ordinary operators.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.errors import CaptureError

_LIBRARIES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    str(Path(__file__).resolve().parents[1] / "frontends"),
)


@contextlib.contextmanager
def eager_code() -> Iterator[None]:
    """Run a model operator by operator: neither as compiled code nor by torch's fused attention layers.

    Both hide their operators and weights from a mode. The fused layers compute something else, too: nn.TransformerEncoder
    gives zeros for padded tokens by its fast path, and the layers' own results without it, as every exported program does.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Nothing can be compiled before this module is loaded, and loading it takes seconds.
    is_loaded = "torch._dynamo" in sys.modules or "torch.nn.attention.flex_attention" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if is_loaded else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def run_eagerly(
    operator: HigherOrderOperator, args: Sequence[Any], kwargs: Mapping[str, Any], mode: TorchDispatchMode, where: str
) -> Any:
    """What an operator of functions gives, while ``mode`` sees each operator that its functions call.

    Args:
        operator: the operator.
        args, kwargs: its arguments, functions among them.
        mode: the mode that met the operator; it is entered again.
        where: the submodule that runs, for the message.

    Raises:
        CaptureError: nothing is known of running this operator eagerly; names it, the submodule and the user's line.
    """
    plain = _PLAIN.get(operator_name(operator)) or operator.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if plain is None:
        raise CaptureError(_refusal(operator, where, "it has no eager implementation"))
    with mode:
        try:
            return plain(*args, **kwargs)
        except AssertionError as error:  # torch's own implementations assert that no mode watches them
            raise CaptureError(_refusal(operator, where, f"its implementation asserts ({error})")) from error


def _refusal(operator: HigherOrderOperator, where: str, why: str) -> str:
    return (
        f"the operator {operator_name(operator)} in {where} ({user_line()}) takes functions, and what they do cannot be "
        f"recorded: {why}. Write that part of forward as plain Python: the recording follows the branch that the example takes"
    )


def operator_name(operator: HigherOrderOperator) -> str:
    """What torch calls the operator ("cond")."""
    return str(operator.name())  # type: ignore[no-untyped-call]  # torch types it not


def user_line() -> str:
    """File and line of the innermost running frame that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith((*_LIBRARIES, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "an unknown line"


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _scan(combine: Callable[..., Any], init: Sequence[Any], xs: Sequence[Tensor], additional: Sequence[Any] = ()) -> Any:
    """Carry ``init`` along dimension 0 of ``xs``; the results of every step are stacked behind the carried values."""
    carried, steps = list(init), []
    for index in range(xs[0].shape[0] if xs else 0):
        results = pytree.tree_leaves(
            combine(*carried, *[item.select(0, index) for item in xs], *additional), is_leaf=lambda leaf: leaf is None
        )
        carried = results[: len(init)]
        steps.append(results[len(init) :])
    return (*carried, *(torch.stack(column) if column[0] is not None else None for column in zip(*steps, strict=True)))


_PLAIN: dict[str, Callable[..., Any]] = {"cond": _cond, "scan": _scan}
"""Operators whose own eager implementation refuses to be watched."""
