"""Running the ``evaluate`` of a model.py on the dense model, the pruned one, and the ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfcompile.cli.console import StageProgress

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
        from mfcompile.metrics import evaluated

        with self._progress.stage(f"evaluating: {variant}"):
            self.metrics[variant] = evaluated(self._evaluate, model, variant)

    def add_onnx(self, path: Path, module: nn.Module, example_inputs: ExampleInputs) -> None:
        """Evaluate the ONNX file through the module's forward; what cannot be done is noted, not refused."""
        if self._evaluate is None:
            return
        from mfcompile.cli.onnx_module import OnnxModule

        try:
            self.add(ONNX, OnnxModule(path, module, example_inputs))
        except Exception as error:  # an evaluate may need more of a model than its forward
            from mfcompile.metrics import first_cause

            cause = first_cause(error)
            self.notes.append(f"evaluate does not run on the ONNX file ({type(cause).__name__}: {cause})")
