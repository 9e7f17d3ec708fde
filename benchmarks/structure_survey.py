"""Which structural units are found in tiny models of many architectures, and whether their removal is what it should be.

python -m benchmarks.structure_survey [KEY ...] [--show]

Every model is a row of the zoo's table (``benchmarks.zoo``) with random weights. Half of the elements of every unit are
removed, chosen at random, and outputs are compared with those of the original model whose output weights are zero in the
columns of these elements. A row of the result has the number of units by kind, refused ones with node and reason, and the
largest difference of any output relative to its largest value. Rows that are there already stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mfcompile
from benchmarks.zoo.build import build
from benchmarks.zoo.table import all_rows
from mfcompile.inputs import output_tensors
from mfcompile.region import RegionMap

RESULT = Path(__file__).resolve().parent / "results" / "structure_survey.json"
KEYS = (
    "AlignModel", "AltCLIPModel", "AriaModel", "Blip2Model", "BlipForImageTextRetrieval", "BridgeTowerModel", "CLIPSegModel",
    "ChameleonModel", "Cohere2VisionModel", "Dinov2Model", "Emu3Model", "FlavaModel", "Florence2Model", "FuyuModel",
    "Gemma3Model", "GitModel", "GroundingDinoModel", "GroupViTModel", "Idefics3Model", "IdeficsModel", "InstructBlipModel",
    "InternVLModel", "Kosmos2Model", "LayoutLMv3Model", "LlavaModel", "LxmertModel", "MllamaModel", "OwlViTModel",
    "PaliGemmaModel", "Phi4MultimodalModel", "Pix2StructForConditionalGeneration", "Qwen2VLModel", "Qwen2_5_VLModel",
    "Qwen3VLModel", "Siglip2Model", "UdopModel", "ViltModel", "VisionEncoderDecoderModel[donut]", "VisualBertModel",
    "WhisperModel", "XCLIPModel",
)  # fmt: skip


def enlarge(model: nn.Module) -> None:
    """Weights large enough that every part of the model shows in its outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def zeroed(
    model: nn.Module, units: mfcompile.StructuralUnits, remove: Mapping[str, Sequence[int]], regions: RegionMap
) -> nn.Module:
    """The original model with zeros in the columns of W_out that belong to removed elements."""
    changed = copy.deepcopy(model)
    layouts = {site.fqn: site.layout for site in regions.sites}
    with torch.no_grad():
        for name, elements in remove.items():
            unit = units.unit(name)
            weight = changed.get_parameter(unit.output_weight)
            matrices = layouts[unit.output_weight].matrices(weight.detach()).clone()
            for element in elements:
                matrices[..., list(unit.columns(element))] = 0
            weight.copy_(layouts[unit.output_weight].stored(matrices, weight.shape))
    return changed


def survey(key: str) -> dict[str, Any]:
    """One row of the result; "failed" says what could not be done."""
    row = all_rows()[key]
    record: dict[str, Any] = {"key": key, "failed": None}
    started = time.perf_counter()
    try:
        model, inputs = build(row)
        enlarge(model)
        captured = mfcompile.with_token_program(mfcompile.capture(model, inputs))
        regions = mfcompile.infer_regions(captured)
        units = mfcompile.find_units(captured)
        record["units"] = dict(Counter(unit.kind for unit in units.units))
        record["refused"] = [str(item) for item in units.refused]
        generator = torch.Generator().manual_seed(0)
        remove = {
            unit.name: torch.randperm(unit.count, generator=generator)[: max(1, unit.count // 2)].tolist()
            for unit in units.units
        }
        smaller = mfcompile.remove_units(captured, remove)
        with torch.no_grad():
            expected = output_tensors(zeroed(model, units, remove, regions)(**inputs))
            found, dense = output_tensors(smaller.module(**inputs)), output_tensors(model(**inputs))
        record["difference"] = max(_difference(expected[name], found[name]) for name in found)
        record["changed"] = max(_difference(expected[name], dense[name]) for name in found)
        record["parameters"] = _parameters(smaller.module) / _parameters(model)
    except Exception as error:  # a row of the table says what stopped it
        record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.is_floating_point():
        return float((one != other).any())
    scale = one.nan_to_num(posinf=0, neginf=0).abs().max().clamp_min(1e-6)
    return float(((one - other).nan_to_num(posinf=0, neginf=0).abs().max() / scale).item())


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def page_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as the table of docs/structure.md."""
    lines = ["| model | heads | channels | refused | parameters left |", "|---|---|---|---|---|"]
    for row in rows:
        units = row.get("units", {})
        left = f"{row['parameters']:.2f}" if "parameters" in row else "no exported program"
        cells = [row["key"], units.get("heads", 0), units.get("channels", 0), len(row.get("refused", ())), left]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Look at every model, print a table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", default=KEYS)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", action="store_true", help="print what is there, and measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    rows = {row["key"]: row for row in json.loads(arguments.output.read_text())} if arguments.output.is_file() else {}
    for key in () if arguments.show else arguments.keys:
        rows[key] = survey(key)
        console.print(rows[key], soft_wrap=True)
        ordered = [rows[name] for name in sorted(rows)]
        arguments.output.write_text(json.dumps(ordered, indent=1) + "\n")
    table = Table("model", "heads", "channels", "refused", "parameters left", "difference")
    for row in rows.values():
        units = row.get("units", {})
        left = [f"{row['parameters']:.2f}", f"{row['difference']:.0e}"] if "difference" in row else ["", row["failed"]]
        table.add_row(
            row["key"], str(units.get("heads", 0)), str(units.get("channels", 0)), str(len(row.get("refused", ()))), *left
        )
    console.print(table)
    console.print(page_table(list(rows.values())), soft_wrap=True)


if __name__ == "__main__":
    main()
