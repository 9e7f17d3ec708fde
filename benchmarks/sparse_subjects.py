"""Transformers that are pruned for measurements: how they are built, calibrated and exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mfcompile
from benchmarks.models import heavy_tailed
from mfcompile.artifact import ExportedArtifact
from mfcompile.exporters.onnx_model import export_onnx
from mfcompile.frontends.capture import with_export
from mfcompile.graph import CapturedGraph
from mfcompile.masks import MaskSet

SPARSITIES = (0.63, 0.75, 0.9)
PATTERNS = ("unstructured", "16x1", "4x1")
WIDTH = 768


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: what it is like.
        module: in eval mode.
        examples: inputs that it is exported with.
        batches: calibration data.
        sizes: (batch, tokens) that are measured with one thread; tokens of None where they are fixed.
        patterns: of the masks.
    """

    name: str
    module: nn.Module
    examples: dict[str, Tensor]
    batches: list[dict[str, Tensor]]
    sizes: tuple[tuple[int, int | None], ...]
    patterns: tuple[str, ...]


def vit(layers: int) -> Subject:
    """The encoder of ViT-B/16 at 224 pixels: 196 patches and one more token."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=layers, hidden_size=WIDTH, intermediate_size=4 * WIDTH)
    module = heavy_tailed(ViTModel(config, add_pooling_layer=False))
    pixels = torch.randn(9, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    batches = [{"pixel_values": pixels[1 + index : 5 + index]} for index in (0, 4)]
    return Subject("ViT-B-like", module, {"pixel_values": pixels[:1]}, batches, ((1, None), (4, None)), PATTERNS)


def bert(layers: int) -> Subject:
    """The encoder of BERT base."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_size=WIDTH, intermediate_size=4 * WIDTH)
    module = heavy_tailed(BertModel(config, add_pooling_layer=False))
    ids = torch.randint(1000, 30000, (9, 128), generator=torch.Generator().manual_seed(1))

    def inputs(rows: Tensor) -> dict[str, Tensor]:
        return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}

    sizes = ((1, 1), (1, 8), (1, 32), (1, 197), (4, 32))
    return Subject("BERT-like", module, inputs(ids[:1]), [inputs(ids[1:])], sizes, ("unstructured", "16x1"))


SUBJECTS: dict[str, Callable[[int], Subject]] = {"ViT-B-like": vit, "BERT-like": bert}


@dataclass(frozen=True)
class Pruner:
    """A model captured and calibrated once, to be pruned and exported in many ways."""

    captured: CapturedGraph
    regions: mfcompile.RegionMap
    statistics: mfcompile.CalibrationStatistics

    @classmethod
    def of(cls, subject: Subject, *, is_exported: bool = True) -> Pruner:
        """Capture, calibrate and make the program that every file is written from, where there will be files."""
        captured = mfcompile.capture(subject.module, subject.examples)
        regions = mfcompile.infer_regions(captured)
        statistics = mfcompile.calibrate(captured, subject.batches, regions=regions)
        return cls(with_export(captured) if is_exported else captured, regions, statistics)

    def masks(self, sparsity: float, pattern: str) -> MaskSet:
        """Masks of MULTIFLOW."""
        return mfcompile.select_masks(self.captured, self.regions, self.statistics, sparsity=sparsity, pattern=pattern)

    def export(self, path: Path, masks: MaskSet | None, **options: Any) -> ExportedArtifact:
        """Write one file; what it computes is compared when it is measured."""
        pruned = self.captured if masks is None else mfcompile.apply_masks(self.captured, masks)
        return export_onnx(pruned, path, **options)
