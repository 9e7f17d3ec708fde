"""The report: what it holds, that later parts are added without changing it, and that it is plain JSON."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from mfcompile.artifact import ExportedArtifact, OutputParity, ParityReport, TensorEncoding
from mfcompile.graph import BakedScalar, CaptureAttempt, CapturedGraph, Diagnostic, InputSpec
from mfcompile.inputs import ExampleInputs
from mfcompile.masks import MaskSet, PackedMask
from mfcompile.region import COLUMNS, ROWS, InputModality, PruneSite, RegionMap
from mfcompile.report import (
    Report,
    build_report,
    save_report,
    with_capture,
    with_evaluation,
    with_export,
    with_files,
    with_latency,
    with_parity,
    with_source,
)
from mfcompile.statistics import CalibrationStatistics, SiteStatistics


class TwoTowers(nn.Module):
    """A vision weight of 2 x 4, a text weight of 4 x 2 in two halves, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(4, 2, bias=False)
        self.read = nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 1)


def _site(name: str, fqn: str, rows: tuple[int, int], width: int, region: str, skipped: str | None = None) -> PruneSite:
    return PruneSite(name, fqn, rows, rows[1] - rows[0], width, ROWS, region, skipped=skipped)


@pytest.fixture
def captured() -> CapturedGraph:
    image = torch.zeros(2, 4)
    return CapturedGraph(
        graph_module=fx.GraphModule(nn.Module(), fx.Graph()),
        module=TwoTowers(),
        example_inputs=ExampleInputs((), {"image": image}, ("image",)),
        inputs=(InputSpec("image", "image", (2, 4), torch.float32), InputSpec("mask", "mask", (2, 3), torch.int64)),
        output_names=("output",),
        parameter_nodes={},
        aliases={},
        frontend="recorder",
        specialised=("shapes of the example",),
        baked_scalars=(BakedScalar("item", 3, "look", True),),
        attempts=(CaptureAttempt("recorder", True, "", 0.12345), CaptureAttempt("torch.export", False, "why", 1.0)),
        versions={"torch": "2"},
    )


@pytest.fixture
def regions() -> RegionMap:
    return RegionMap(
        modalities=(InputModality("image", "vision", "4 dimensions of floats"), InputModality("mask", None, "a mask")),
        weights={"look.weight": "vision", "read.weight": "text", "head.weight": "fusion"},
        evidence={},
        sites=(
            _site("look.weight", "look.weight", (0, 2), 4, "vision"),
            _site("read.weight[0:1]", "read.weight", (0, 1), 2, "text"),
            _site("read.weight[1:4]", "read.weight", (1, 4), 2, "text"),
            _site("head.weight", "head.weight", (0, 1), 4, "fusion", skipped="outside of any repeated block"),
        ),
        overrides={"read.weight": "read.*"},
        diagnostics=(Diagnostic("read.weight", "region set by the pattern read.*"),),
    )


@pytest.fixture
def masks() -> MaskSet:
    look = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    read = torch.tensor([[0, 1], [0, 0], [1, 1], [0, 0]], dtype=torch.bool)
    packed = {"look.weight": PackedMask.pack(look), "read.weight": PackedMask.pack(read)}
    return MaskSet(packed, {"look.weight": "vision", "read.weight": "text"}, "f" * 64, 0.6)


@pytest.fixture
def statistics() -> CalibrationStatistics:
    return CalibrationStatistics(
        sites={
            "look.weight": SiteStatistics(torch.ones(4), 32, 0, 4),
            "read.weight[0:1]": SiteStatistics(torch.ones(2), 10, 6, 4),
            "read.weight[1:4]": SiteStatistics(torch.ones(2), 16, 0, 4),
        },
        batch_count=2,
        source="calibration batches",
        observed_by="graph",
        padding_masks=("mask",),
    )


@pytest.fixture
def report(captured: CapturedGraph, regions: RegionMap, statistics: CalibrationStatistics, masks: MaskSet) -> Report:
    return build_report(
        captured=captured,
        regions=regions,
        statistics=statistics,
        masks=masks,
        sparsity=0.6,
        options={"rounding": "exact", "seed": 5},
    )


def test_top_level_keys_are_the_schema(report: Report) -> None:
    assert list(report) == [
        "format",
        "format_version",
        "versions",
        "source",
        "model",
        "options",
        "inputs",
        "capture",
        "skipped",
        "overrides",
        "tokens",
        "diagnostics",
        "calibration",
        "totals",
        "regions",
        "sites",
        "digest",
        "export",
        "parity",
        "latency",
        "evaluation",
        "files",
    ]
    assert (report["format"], report["format_version"]) == ("mfcompile.report", 1)
    later = ("source", "export", "parity", "latency", "evaluation", "files")
    assert [report[key] for key in later] == [None] * len(later)


def test_region_rows_count_what_the_masks_hold(report: Report) -> None:
    assert report["regions"] == [
        {
            "region": "vision",
            "sites": 1,
            "weights": 8,
            "kept": 3,
            "sparsity_requested": 0.6,
            "sparsity": 5 / 8,
            "tokens_min": 32,
            "tokens_max": 32,
            "padding_tokens_max": 0,
        },
        {
            "region": "text",
            "sites": 2,
            "weights": 8,
            "kept": 3,
            "sparsity_requested": 0.6,
            "sparsity": 5 / 8,
            "tokens_min": 10,
            "tokens_max": 16,
            "padding_tokens_max": 6,
        },
    ]


def test_totals_of_prunable_and_of_all_parameters(report: Report) -> None:
    assert report["totals"] == {
        "prunable": {"weights": 16, "kept": 6, "sparsity_requested": 0.6, "sparsity": 10 / 16},
        "all_parameters": {"weights": 8 + 8 + 5, "kept": 11, "sparsity": 10 / 21},
    }


def test_rows_of_one_weight_are_counted_apart(report: Report) -> None:
    rows = {site["name"]: (site["kept"], site["weights"], site["tokens"]) for site in report["sites"]}
    assert rows == {"look.weight": (3, 8, 32), "read.weight[0:1]": (1, 2, 10), "read.weight[1:4]": (2, 6, 16)}


def test_rows_of_a_transposed_weight_are_columns_of_its_mask(
    captured: CapturedGraph, regions: RegionMap, masks: MaskSet
) -> None:
    mask = torch.tensor([[1, 0, 0], [1, 0, 1]], dtype=torch.bool)  # stored (in_features 2, out_features 3)
    site = PruneSite("w[0:1]", "w", (0, 1), 1, 2, COLUMNS, "text")
    built = build_report(
        captured=captured,
        regions=RegionMap((), {"w": "text"}, {}, (site,), {}),
        statistics=None,
        masks=MaskSet({"w": PackedMask.pack(mask)}),
        sparsity=0.5,
        options={"rounding": "exact", "seed": 0},
    )
    assert built["sites"][0]["kept"] == 2
    assert (built["calibration"], built["sites"][0]["tokens"]) == (None, None)


def test_inputs_skipped_sites_and_capture(report: Report, masks: MaskSet) -> None:
    assert report["inputs"] == [
        {
            "name": "image",
            "shape": [2, 4],
            "dtype": "float32",
            "modality": "vision",
            "reason": "4 dimensions of floats",
        },
        {"name": "mask", "shape": [2, 3], "dtype": "int64", "modality": None, "reason": "a mask"},
    ]
    assert report["skipped"] == [
        {
            "name": "head.weight",
            "region": "fusion",
            "shape": [1, 4],
            "weights": 4,
            "reason": "outside of any repeated block",
        }
    ]
    assert [attempt["succeeded"] for attempt in report["capture"]["attempts"]] == [True, False]
    assert report["capture"]["baked_scalars"] == [{"node": "item", "value": 3, "module": "look", "from_input": True}]
    assert report["diagnostics"] == [{"subject": "read.weight", "reason": "region set by the pattern read.*"}]
    assert (report["digest"], report["model"]["fingerprint"]) == (masks.digest(), "f" * 64)
    assert report["calibration"] == {
        "source": "calibration batches",
        "batches": 2,
        "observed_by": "graph",
        "padding_masks": ["mask"],
        "weighting": "none",
    }


def _artifact() -> ExportedArtifact:
    return ExportedArtifact(
        path=Path("/somewhere/model.onnx"),
        format="packed",
        values="fp32",
        size_bytes=400,
        dense_size_bytes=1000,
        encodings=(
            TensorEncoding("look.weight", "gap8", 15, 32, 3, 8),
            TensorEncoding("read.weight", "gap8", 1, 32, 3, 8),
        ),
        input_names=("image",),
        output_names=("output",),
        dynamic_axes={"image": {0: "batch"}},
        files=(Path("/somewhere/model.onnx"),),
        opset=18,
        load_peak_bytes=5000,
    )


def _parity(difference: float) -> ParityReport:
    outputs = (OutputParity("output", difference, 2.0, difference < 1e-4),)
    return ParityReport(outputs, 1e-4, 1e-5, (1, 2), ("example inputs",), "onnxruntime 1.20")


def test_later_parts_are_added_to_a_copy(report: Report, tmp_path: Path) -> None:
    before = copy.deepcopy(report)
    full = with_source(report, path="model.py", kind="python")
    full = with_export(full, _artifact())
    full = with_parity(full, _parity(1e-6))
    full = with_latency(full, {"medians_ms": {"dense": 2.0, "packed": 2.0}, "ratio": 1.0})
    full = with_evaluation(full, {"dense": {"R@1": 0.9}, "pruned": {"R@1": float("nan")}}, ["a note"])
    full = with_files(full, {"masks.safetensors": 12})
    assert report == before
    assert full["export"]["pruned_ratio"] == 16 / 64
    assert full["export"]["encodings"] == {"gap8": 2}
    assert full["export"]["dynamic_axes"] == {"image": {"0": "batch"}}
    assert full["export"]["files"] == ["model.onnx"]
    assert full["evaluation"] == {"metrics": {"dense": {"R@1": 0.9}, "pruned": {"R@1": None}}, "notes": ["a note"]}
    assert full["parity"]["passed"] is True
    assert json.loads(save_report(full, tmp_path / "report.json").read_text()) == full


def test_a_later_capture_replaces_the_earlier_one(report: Report, captured: CapturedGraph) -> None:
    failed = CaptureAttempt("torch.export", False, "another reason", 2.0)
    later = with_capture(report, replace(captured, attempts=(*captured.attempts, failed)))
    assert [item["detail"] for item in later["capture"]["attempts"]] == ["", "why", "another reason"]
    assert len(report["capture"]["attempts"]) == 2


def test_a_difference_that_is_nan_fails_and_is_json(report: Report, tmp_path: Path) -> None:
    full = with_parity(report, _parity(float("nan")))
    assert (full["parity"]["passed"], full["parity"]["max_abs_diff"]) == (False, None)
    assert "NaN" not in save_report(full, tmp_path / "report.json").read_text()


def test_report_is_deterministic(
    captured: CapturedGraph, regions: RegionMap, statistics: CalibrationStatistics, masks: MaskSet, report: Report
) -> None:
    again = build_report(
        captured=captured,
        regions=regions,
        statistics=statistics,
        masks=masks,
        sparsity=0.6,
        options={"rounding": "exact", "seed": 5},
    )
    assert json.dumps(again) == json.dumps(report)
