"""What capture and regions cost on models of real size: seconds, and peak memory against the model's own.

Every measurement runs in a process of its own, so that what one leaves in memory is not counted for the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


def tiny() -> tuple[nn.Module, dict[str, Tensor]]:
    """A CLIP of two layers per tower."""
    import transformers as tr

    text = {**TINY, "vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 98, "bos_token_id": 1}
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    return tr.CLIPModel(tr.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), _inputs(16, 90)


def clip_b32() -> tuple[nn.Module, dict[str, Tensor]]:
    """CLIP-B/32 with random weights: 151 M parameters."""
    import transformers as tr

    return tr.CLIPModel(tr.CLIPConfig()), _inputs(224, 1000)


def blip_base() -> tuple[nn.Module, dict[str, Tensor]]:
    """BLIP-base for retrieval with random weights: ViT-B/16 at 384 pixels, a text encoder of 12 layers."""
    import transformers as tr

    config = tr.BlipConfig(vision_config={"image_size": 384})
    return tr.BlipForImageTextRetrieval(config), _inputs(384, 1000)


MODELS = {"tiny": tiny, "clip_b32": clip_b32, "blip_base": blip_base}
STEPS = ("eager", "capture", "plan", "export")


def _inputs(size: int, words: int) -> dict[str, Tensor]:
    ids = torch.randint(5, words, (2, 12))
    return {"pixel_values": torch.rand(2, 3, size, size), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def capture_cost() -> dict[str, dict[str, Any]]:
    """One row per model: each step in a process of its own.

    ``eager`` is one forward, ``capture`` is capture and regions, ``plan`` the same on the meta device, ``export`` adds
    torch.export to ``capture``. Seconds are those of the clock and, for a machine that others use, of the processor. Memory
    is the rise of the resident set over the level before the model was built, divided by the bytes of its parameters; the
    model itself counts as 1.
    """
    rows = {}
    for name in MODELS:
        row: dict[str, Any] = {}
        for step in STEPS:
            command = [sys.executable, str(Path(__file__).resolve()), name, step]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            found = json.loads(ran.stdout.splitlines()[-1])
            row |= {key: value for key, value in found.items() if key in ("parameters", "model_mib", "linear_weights")}
            row |= {f"{step}_{key}": found[key] for key in ("s", "cpu_s", "peak_mib")}
            if step != "plan":
                row[f"{step}_peak_of_model"] = found["peak_mib"] / found["model_mib"]
        rows[name] = row
    return rows


def measure(name: str, step: str) -> dict[str, Any]:
    """One step in this process."""
    import mfcompile
    from benchmarks.machine import peak_memory
    from mfcompile.frontends.capture import with_export

    small = tiny()  # loads what is loaded once, so that it is not counted
    mfcompile.infer_regions(mfcompile.capture(small[0].eval(), small[1]))
    if step == "export":
        with_export(mfcompile.capture(small[0].eval(), small[1]))
    result: dict[str, Any] = {}
    with peak_memory() as memory:
        torch.manual_seed(0)
        if step == "plan":
            with torch.device("meta"):
                model = MODELS[name]()[0]
            config: Any = model.config
            inputs = _inputs(config.vision_config.image_size, 90)
        else:
            model, inputs = MODELS[name]()
        model.eval()
        result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        result["model_mib"] = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
        started, worked = time.perf_counter(), time.process_time()
        if step == "eager":
            with torch.inference_mode():
                model(**inputs)
        else:
            captured = mfcompile.capture(model, inputs)
            regions = mfcompile.infer_regions(captured)
            result["linear_weights"] = len(regions.sites)
            if step == "export":
                with_export(captured)
        result |= {"s": time.perf_counter() - started, "cpu_s": time.process_time() - worked}
    result["peak_mib"] = memory["rise_mib"]
    return result


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
