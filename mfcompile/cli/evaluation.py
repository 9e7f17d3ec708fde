"""Running the ``evaluate`` of a model.py on the dense model, the pruned one, and the ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli.console import StageProgress
from mfcompile.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from mfcompile.inputs import ExampleInputs

DENSE, PRUNED, ONNX = "dense", "pruned", "pruned, onnxruntime"


class Evaluation:
    """Metrics of every variant that was evaluated.

    Attributes:
        metrics: variant -> metric -> value.
        notes: variants that could not be evaluated, and why.
    """

    def __init__(self, evaluate: Callable[[Any], Any] | None, progress: StageProgress) -> None:
        self.metrics: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []
        self._evaluate = evaluate
        self._progress = progress

    def of_dense(self) -> Evaluation:
        """Another evaluation that starts from the dense model's metrics."""
        other = Evaluation(self._evaluate, self._progress)
        other.metrics |= self.metrics
        return other

    def add(self, variant: str, model: nn.Module) -> None:
        """Evaluate one variant in eval mode.

        Raises:
            InputError: ``evaluate`` failed, or returned something that is no metric.
        """
        if self._evaluate is None:
            return
        import torch

        was_training = model.training
        model.eval()
        try:
            with self._progress.stage(f"evaluating: {variant}"), torch.no_grad():
                result = self._evaluate(model)
        except Exception as error:
            cause = _first_cause(error)
            raise InputError(
                f"evaluate failed on the {variant} model: {type(cause).__name__}: {cause}. "
                f"Correct it in model.py (--debug shows where), or pass --no-evaluate"
            ) from error
        finally:
            model.train(was_training)
        self.metrics[variant] = read_metrics(result)

    def add_onnx(self, path: Path, module: nn.Module, example_inputs: ExampleInputs) -> None:
        """Evaluate the ONNX file through the module's forward; what cannot be done is noted, not refused."""
        if self._evaluate is None:
            return
        from mfcompile.cli.onnx_module import OnnxModule

        try:
            self.add(ONNX, OnnxModule(path, module, example_inputs))
        except Exception as error:  # an evaluate may need more of a model than its forward
            cause = _first_cause(error)
            self.notes.append(f"evaluate does not run on the ONNX file ({type(cause).__name__}: {cause})")


def read_metrics(result: Any) -> dict[str, float]:
    """What ``evaluate`` returned as metric -> number.

    Raises:
        InputError: it is neither a number nor a mapping from names to numbers.
    """
    named = result if isinstance(result, Mapping) else {"score": result}
    try:
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"evaluate returned {type(result).__name__} {str(result)[:80]!r}: "
            f"it must return a number, or a dict from metric names to numbers"
        ) from error


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong first, below the explanations that were put around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
