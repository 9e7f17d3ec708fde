"""What every format of a pruned model takes on disk and to load, in stock onnxruntime and with ``mfcompile.load_session``.

python -m benchmarks.formats [--rounds 5]

The model is four transformer blocks of width 768 (28.3 M weights, random masks). Every load is a process of its own; files
take turns, and the least processor time and the median peak of all turns count. Peaks are those of resident memory over that
of a process that has imported everything and loaded nothing. Figures go to ``results/formats.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULT = Path(__file__).resolve().parent / "results" / "formats.json"
WIDTH, BLOCKS, TOKENS = 768, 4, 197


class Blocks(nn.Module):
    """Transformer encoder blocks on tokens of a fixed width."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


@dataclass(frozen=True)
class Row:
    """One way of storing and loading.

    Attributes:
        sparsity: fraction removed.
        format, encoding, values: how the file is stored; the encoding of every weight, "" for the exporter's choice.
        inline: plain nodes instead of SparseLinear.
        loader: "onnxruntime", "load_session" (decoded on the host) or "runtime" (sparse kernels).
    """

    sparsity: float
    format: str
    encoding: str = ""
    values: str = "fp32"
    inline: bool = False
    loader: str = "onnxruntime"

    @property
    def file(self) -> str:
        """Name of the .onnx file."""
        nodes = "inline" if self.inline else "function"
        return f"{self.format}-{self.encoding or 'chosen'}-{self.values}-{nodes}-{self.sparsity}.onnx"


def rows() -> Iterator[Row]:
    """Everything that is measured."""
    dense = Row(0.63, "dense")
    yield dense
    yield replace(dense, format="onnx-sparse")
    for encoding in ("gap8", "gap4", "mask"):
        packed = Row(0.63, "packed", encoding)
        yield from (packed, replace(packed, inline=True), replace(packed, values="fp16"))
    chosen = Row(0.63, "packed")
    yield from (chosen, replace(chosen, loader="load_session"), replace(chosen, loader="runtime"))
    yield replace(chosen, inline=True, loader="load_session")
    for sparsity in (0.5, 0.75, 0.9):
        yield from (Row(sparsity, "packed"), Row(sparsity, "packed", values="fp16"))


def write_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Export every file; name -> its sizes and what the exporter predicts."""
    import mfcompile
    from mfcompile.exporters import weight_placement
    from mfcompile.exporters.onnx_model import export_onnx
    from mfcompile.exporters.packing import possible_encodings
    from mfcompile.frontends.capture import with_export
    from mfcompile.masks import PackedMask

    torch.manual_seed(0)
    captured = with_export(mfcompile.capture(Blocks().eval(), {"tokens": torch.randn(1, TOKENS, WIDTH)}))
    names = [name for name, item in captured.module.named_parameters() if item.ndim == 2]
    found: dict[str, dict[str, Any]] = {}
    dense_bytes = 4 * BLOCKS * 12 * WIDTH * WIDTH
    for row in rows():
        if row.file in found:
            continue
        path = folder / row.file
        if path.exists():
            found[row.file] = describe(path, dense_bytes)
            continue
        generator = torch.Generator().manual_seed(1)
        masks = {
            name: torch.rand(captured.module.get_parameter(name).shape, generator=generator) >= row.sparsity for name in names
        }
        masked = replace(captured, masks=mfcompile.MaskSet({name: PackedMask.pack(mask) for name, mask in masks.items()}))
        allowed = ("dense", row.encoding) if row.encoding else ("dense", "gap8", "gap4", "mask")
        with mock.patch.object(weight_placement, "possible_encodings", partial(_only, possible_encodings, allowed)):
            export_onnx(
                masked, path, format=row.format, values=row.values, inline=row.inline, external_data=row.format != "onnx-sparse"
            )
        found[row.file] = describe(path, dense_bytes)
    return found


def describe(path: Path, dense_bytes: int) -> dict[str, Any]:
    """Sizes of a file, its encodings, and what is predicted of loading it."""
    import numpy as np
    import onnx

    from mfcompile.exporters.load_cost import predict_load
    from mfcompile.exporters.packing import EncodingPlan
    from mfcompile.exporters.stored_weights import read_weights

    model = onnx.load(path, load_external_data=False)
    tensors = {item.name: item for item in model.graph.initializer}
    plans = []
    for stored in read_weights({item.key: item.value for item in model.metadata_props}).values():
        values = tensors[stored.tensors[1]]
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(values.data_type))
        plans.append(EncodingPlan(stored.encoding, values.dims[0], kind, np.dtype(np.float32), stored.shape, values.dims[0]))
    data = path.with_name(f"{path.name}.data")
    data_bytes = data.stat().st_size if data.exists() else 0
    cost = predict_load(path.stat().st_size, data_bytes, plans, dense_bytes)
    total = path.stat().st_size + data_bytes
    weights = BLOCKS * 12 * WIDTH * WIDTH
    return {
        "bytes_per_weight": (sum(plan.stored_bytes for plan in plans) or total) / weights,
        "encodings": sorted({plan.encoding for plan in plans}),
        "size_bytes": total,
        "predicted_peak_bytes": cost.peak_bytes,
        "predicted_time_ratio": round(cost.time_ratio, 2),
    }


def _only(possible: Any, wanted: tuple[str, ...], *args: Any, **options: Any) -> Any:
    """Encodings without a choice: the one that the benchmark asks for, where it is possible."""
    plans = possible(*args, **options)
    found = tuple(plan for plan in plans if plan.encoding in wanted)
    return found[1:] if len(wanted) == 2 and len(found) > 1 else found


def load(path: Path, loader: str) -> dict[str, Any]:
    """Load one file in this process: processor and wall seconds, peak of memory, and a sum of the output."""
    import time

    import numpy as np
    import onnxruntime

    import mfcompile.loading
    from mfcompile import runtime
    from mfcompile.exporters import unpacking
    from mfcompile.session_options import session_options

    assert unpacking  # imported before memory is measured
    if loader == "runtime":
        runtime.library_path()
    start, cpu, wall = _memory("VmRSS"), time.process_time(), time.perf_counter()
    if loader == "onnxruntime":
        session = onnxruntime.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    else:
        session = mfcompile.load_session(path, threads=1, runtime=loader == "runtime")
    seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    memory = {"peak_bytes": _memory("VmHWM") - start, "kept_bytes": _memory("VmRSS") - start}
    tokens = np.random.default_rng(0).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    return {**seconds, **memory, "output": float(np.abs(session.run(None, {"tokens": tokens})[0]).sum())}


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def zipped_bytes(path: Path, scratch: Path) -> int:
    """Bytes of a file and its external data, zipped."""
    with zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for file in path.parent.glob(f"{path.name}*"):
            archive.write(file, file.name)
    size = scratch.stat().st_size
    scratch.unlink()
    return size


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """All rows, in turns."""
    from benchmarks import machine

    files = write_files(folder)
    turns: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows()}
    for _ in range(rounds):
        for row, found in turns.items():
            command = [sys.executable, "-m", "benchmarks.formats", "--load", str(folder / row.file), "--loader", row.loader]
            root = Path(__file__).resolve().parents[1]
            result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
            found.append(json.loads(result.stdout.splitlines()[-1]))
    dense = next(row for row in turns if row.format == "dense")
    weights = BLOCKS * 12 * WIDTH * WIDTH
    zipped = (dense.file, Row(0.63, "packed").file)
    sizes = {name: zipped_bytes(folder / name, folder / "archive.zip") for name in zipped}
    return {
        "machine": machine.describe(),
        "weights": weights,
        "rounds": rounds,
        "zipped_bytes": {name: {"file": files[name]["size_bytes"], "zip": size} for name, size in sizes.items()},
        "rows": [_summary(row, found, files[row.file], turns[dense]) for row, found in turns.items()],
    }


def _summary(row: Row, found: list[dict[str, Any]], file: dict[str, Any], dense: list[dict[str, Any]]) -> dict[str, Any]:
    least = min(item["cpu_s"] for item in found)
    return {
        **asdict(row),
        **file,
        "cpu_s": round(least, 3),
        "cpu_ratio": round(least / min(item["cpu_s"] for item in dense), 2),
        "wall_s": round(statistics.median(item["wall_s"] for item in found), 3),
        "peak_bytes": int(statistics.median(item["peak_bytes"] for item in found)),
        "peak_spread": [min(item["peak_bytes"] for item in found), max(item["peak_bytes"] for item in found)],
        "kept_bytes": int(statistics.median(item["kept_bytes"] for item in found)),
        "output_ratio": found[0]["output"] / dense[0]["output"],
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    titles = ("sparsity", "file", "loader", "B/weight", "MB", "cpu s", "x", "peak MB", "said", "kept MB")
    print("{:>8} {:34} {:12} {:>8} {:>5} {:>6} {:>5} {:>8} {:>6} {:>7}".format(*titles))
    for row in result["rows"]:
        encoding, nodes = row["encoding"] or "+".join(row["encodings"]), "inline" if row["inline"] else ""
        name = f"{row['format']} {encoding} {row['values']} {nodes}"
        print(
            f"{row['sparsity']:>8} {name:34} {row['loader']:12} {row['bytes_per_weight']:8.3f} {row['size_bytes'] / 1e6:5.0f} "
            f"{row['cpu_s']:6.2f} {row['cpu_ratio']:5.1f} {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['predicted_peak_bytes'] / 1e6:6.0f} {row['kept_bytes'] / 1e6:7.0f}"
        )
    for name, item in result["zipped_bytes"].items():
        print(f"{name}: {item['file'] / 1e6:.0f} MB, zipped {item['zip'] / 1e6:.0f} MB")


def main() -> None:
    """Measure and print, or load one file in a child process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a folder for the files, to be used again (default: a temporary one)")
    parser.add_argument("--show", action="store_true", help="print the figures of the last run")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loader", default="onnxruntime", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load is not None:
        print(json.dumps(load(args.load, args.loader)))
        return
    if not args.show:
        with tempfile.TemporaryDirectory() as folder:
            if args.keep is not None:
                args.keep.mkdir(parents=True, exist_ok=True)
            result = measure(args.keep or Path(folder), args.rounds)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
