"""Models in parts: what each part holds, that the chain computes what the module and the whole file compute."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import mfcompile
from mfcompile.artifact import ExportedArtifact
from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.split_manifest import MANIFEST, SplitManifest
from mfcompile.frontends.capture import with_export
from mfcompile.frontends.sources import load_source
from mfcompile.graph import CapturedGraph
from mfcompile.region import RegionMap

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
EMOJI = Path(__file__).parents[2] / "examples" / "emoji_xvlm" / "model.py"


@dataclass(frozen=True)
class Split:
    """One pruned model, in parts and as one file."""

    pruned: CapturedGraph
    regions: RegionMap
    parts: ExportedArtifact
    whole: ExportedArtifact

    @property
    def manifest(self) -> SplitManifest:
        return SplitManifest.load(self.parts.path)


def build(module: nn.Module, inputs: Any, folder: Path) -> Split:
    """Prune by magnitude, write in parts and as one file."""
    captured = mfcompile.capture(module.eval(), inputs)
    regions = mfcompile.infer_regions(captured)
    masks = mfcompile.select_masks(captured, regions, None, criterion="magnitude")
    pruned = with_export(mfcompile.apply_masks(captured, masks))
    parts = mfcompile.export_onnx(pruned, folder / "parts", split="regions", regions=regions)
    return Split(pruned, regions, parts, mfcompile.export_onnx(pruned, folder / "whole.onnx"))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Split:
    source = load_source(EMOJI)
    return build(source.model, source.example_inputs, tmp_path_factory.mktemp("emoji"))


def arrays(inputs: dict[str, Tensor], *names: str) -> dict[str, Any]:
    return {name: inputs[name].numpy() for name in (names or inputs)}


def run_file(path: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    known = {node.name for node in session.get_inputs()}
    return dict(zip(names, session.run(None, {key: value for key, value in feeds.items() if key in known}), strict=True))


def assert_parts_equal_whole(split: Split) -> None:
    """The chain against the whole file and against the module: the example, another batch size, other inputs."""
    model = mfcompile.load_parts(split.parts.path.parent)
    tensors = split.pruned.example_inputs.tensors()
    names = [node.name for node in model.get_outputs()]
    found = model.run(None, arrays(tensors, *(node.name for node in model.get_inputs())))
    expected = run_file(split.whole.path, arrays(tensors))
    assert list(expected) == names
    for name, value in zip(names, found, strict=True):
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    report = mfcompile.verify(split.parts, split.pruned)
    assert report.passed, report
    assert not mfcompile.verify(split.parts, replace(split.pruned, masks=None)).passed, "an unpruned module must not pass"


def assert_files_are_sound(split: Split, folder: Path) -> None:
    """Every part alone: valid, loadable, no decode operator left, each masked weight where it is read and nowhere else."""
    fqns = {item.fqn for item in split.parts.encodings}
    assert fqns == {item.fqn for item in split.whole.encodings}
    holders: Counter[str] = Counter()
    for part in split.parts.parts:
        onnx.checker.check_model(str(part.path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        onnxruntime.InferenceSession(part.path, options, providers=["CPUExecutionProvider"])
        left = onnx.load(folder / "optimised.onnx").graph
        assert not [item.name for item in left.initializer if item.name.endswith(".gaps")], "it decodes at every run"
        holders.update(item.fqn for item in part.encodings)
    tied = {note.split(" is stored in ")[0] for note in split.manifest.notes if " is stored in " in note}
    assert {fqn for fqn, count in holders.items() if count > 1} <= tied
    assert split.parts.size_bytes == sum(file.stat().st_size for file in split.parts.files)


def test_the_trained_example_in_parts(emoji: Split, tmp_path: Path) -> None:
    assert [part.path.name for part in emoji.parts.parts] == ["vision.onnx", "text.onnx", "fusion.onnx"]
    assert_parts_equal_whole(emoji)
    assert_files_are_sound(emoji, tmp_path)
    ratio = emoji.parts.size_bytes / emoji.whole.size_bytes
    assert 0.99 < ratio < 1.02
    assert emoji.parts.dense_size_bytes == emoji.whole.dense_size_bytes


def test_weights_lie_in_the_part_of_their_region(emoji: Split) -> None:
    for part in emoji.parts.parts:
        inside = {item.fqn for item in part.encodings}
        assert inside == {site.fqn for site in emoji.regions.by_region()[part.path.stem]}


def test_an_image_is_encoded_once_for_five_texts(emoji: Split) -> None:
    """The point of it: what comes out of the vision part is fed five times."""
    source = load_source(EMOJI)
    model = mfcompile.load_parts(emoji.parts.path.parent)
    handed = [item.name for item in model.manifest.parts[0].outputs if item.name not in model.manifest.outputs]
    assert handed == ["vision_features"]
    batches = list(source.calibration())[:5] if source.calibration else []
    pixels = batches[0]["pixel_values"][:1]
    texts = [
        {name: batch[name][index : index + 1] for name in ("input_ids", "attention_mask")}
        for index, batch in enumerate(batches)
    ]
    calls = Counter[str]()
    for name, session in list(model.parts.items()):
        model.parts[name] = _Counted(session, name, calls)
    (features,) = model.run(["vision_features"], arrays({"pixel_values": pixels}))
    for text in texts:
        scores, logits = model.run(["itm_logits", "mlm_logits"], {"vision_features": features, **arrays(text)})
        expected = run_file(emoji.whole.path, arrays({"pixel_values": pixels, **text}))
        np.testing.assert_allclose(scores, expected["itm_logits"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(logits, expected["mlm_logits"], rtol=1e-4, atol=1e-4)
    assert calls == {"vision": 1, "text": 5, "fusion": 5}


class _Counted:
    """A session that counts its runs."""

    def __init__(self, session: Any, name: str, calls: Counter[str]) -> None:
        self.session, self.name, self.calls = session, name, calls

    def run(self, *words: Any) -> Any:
        self.calls[self.name] += 1
        return self.session.run(*words)


def test_dense_and_packed_parts_are_bit_identical(emoji: Split, tmp_path: Path) -> None:
    dense = mfcompile.export_onnx(emoji.pruned, tmp_path / "dense", format="dense", split="regions", regions=emoji.regions)
    feeds = arrays(emoji.pruned.example_inputs.tensors())
    packed = mfcompile.load_parts(emoji.parts.path).run(None, feeds)
    for one, other in zip(packed, mfcompile.load_parts(dense.path).run(None, feeds), strict=True):
        assert one.tobytes() == other.tobytes()
    assert dense.size_bytes > emoji.parts.size_bytes


def test_regions_of_the_user_decide(emoji: Split, tmp_path: Path) -> None:
    """Keys and values that are said to be vision are computed once per image."""
    kinds = [f"cross_attention.{kind}" for kind in ("key", "value")]
    regions = mfcompile.infer_regions(emoji.pruned, regions={f"fusion_encoder.*.{kind}": "vision" for kind in kinds})
    moved = {f"fusion_encoder.layers.{layer}.{kind}.weight" for layer in range(3) for kind in kinds}
    literal = mfcompile.infer_regions(emoji.pruned, cross_attention_kv="input")
    assert {literal.weights[fqn] for fqn in moved} == {regions.weights[fqn] for fqn in moved} == {"vision"}
    artifact = mfcompile.export_onnx(emoji.pruned, tmp_path / "parts", split="regions", regions=regions)
    vision = artifact.parts[0]
    assert moved <= {item.fqn for item in vision.encodings}
    assert "vision_features_6" in vision.output_names
    assert mfcompile.verify(artifact, emoji.pruned).passed


def test_the_code_of_the_guide_runs(emoji: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = GUIDE.read_text().split("## Separate files per region")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree(emoji.parts.path.parent, tmp_path / "pruned")
    monkeypatch.chdir(tmp_path)
    feeds = arrays(emoji.pruned.example_inputs.tensors())
    rows = range(len(feeds["input_ids"]))
    sentences = [(feeds["input_ids"][row : row + 1], feeds["attention_mask"][row : row + 1]) for row in rows]
    names: dict[str, Any] = {"pixel_values": feeds["pixel_values"][:1], "sentences": sentences}
    for block in blocks:
        exec(block, names)
    for row in rows:
        given = {"pixel_values": feeds["pixel_values"][:1], "input_ids": sentences[row][0], "attention_mask": sentences[row][1]}
        expected = run_file(emoji.whole.path, given)["itm_logits"]
        np.testing.assert_allclose(names["scores"][row], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(names["scores"][row], names["again"][row])


def copy_of(emoji: Split, folder: Path) -> Path:
    shutil.copytree(emoji.parts.path.parent, folder / "copy")
    return folder / "copy"


def test_a_missing_part_is_refused(emoji: Split, tmp_path: Path) -> None:
    copy = copy_of(emoji, tmp_path)
    (copy / "text.onnx").unlink()
    with pytest.raises(InputError, match=r"the part text is missing: there is no .*text\.onnx"):
        mfcompile.load_parts(copy)


def test_a_changed_part_is_refused(emoji: Split, tmp_path: Path) -> None:
    copy = copy_of(emoji, tmp_path)
    data = bytearray((copy / "vision.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "vision.onnx").write_bytes(data)
    with pytest.raises(InputError, match=r"vision\.onnx is not the file that model\.split\.json describes"):
        mfcompile.load_parts(copy)
    assert mfcompile.load_parts(copy, check=False).manifest == emoji.manifest


def test_a_directory_without_a_manifest_is_refused(emoji: Split, tmp_path: Path) -> None:
    copy = copy_of(emoji, tmp_path)
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"there is no model\.split\.json at"):
        mfcompile.load_parts(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["parts"].pop(0), "reads vision_features of vision, which no earlier part gives"),
        (lambda d: d["parts"].reverse(), "which no earlier part gives"),
        (lambda d: d["parts"][0]["files"][0].update(file="../vision.onnx"), "does not lie beside the manifest"),
        (lambda d: d["outputs"].append("nothing"), "no part gives the output nothing"),
        (lambda d: d.pop("parts"), "is damaged"),
        (lambda d: d.update(format="other"), "is not the manifest of a split model"),
        (lambda d: d.update(format_version=9), "is of version 9"),
        (lambda d: d["parts"][1]["inputs"][0].update(name="input_ids_2"), "which is no input of the model"),
    ],
)
def test_a_broken_manifest_is_refused(emoji: Split, tmp_path: Path, change: Any, message: str) -> None:
    copy = copy_of(emoji, tmp_path)
    document = json.loads((copy / MANIFEST).read_text())
    change(document)
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        mfcompile.load_parts(copy)


def test_the_runner_names_what_is_missing_or_unknown(emoji: Split) -> None:
    model = mfcompile.load_parts(emoji.parts.path)
    feeds = arrays(emoji.pruned.example_inputs.tensors())
    with pytest.raises(InputError, match="the part vision needs the input pixel_values to give image_embeds"):
        model.run(["image_embeds"], arrays(emoji.pruned.example_inputs.tensors(), "input_ids", "attention_mask"))
    with pytest.raises(InputError, match="no part gives 'nothing'"):
        model.run(["nothing"], feeds)
    with pytest.raises(InputError, match="the model has no input 'pixels'"):
        model.run(None, {**feeds, "pixels": feeds["pixel_values"]})


def test_exporting_again_replaces_the_parts_and_leaves_other_files(emoji: Split, tmp_path: Path) -> None:
    copy = copy_of(emoji, tmp_path)
    (copy / "notes.txt").write_text("mine")
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / "old.onnx").write_bytes(b"an earlier part")
    manifest["parts"][0]["files"].append({"file": "old.onnx", "size_bytes": 15, "sha256": ""})
    (copy / MANIFEST).write_text(json.dumps(manifest))
    mfcompile.export_onnx(emoji.pruned, copy, values="fp16", split="regions", regions=emoji.regions)
    assert {path.name for path in copy.iterdir()} == {"vision.onnx", "text.onnx", "fusion.onnx", MANIFEST, "notes.txt"}
    assert mfcompile.load_parts(copy).manifest.storage["values"] == "fp16"


def test_a_failed_export_leaves_what_was_there(emoji: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfcompile.exporters import split_files

    copy = copy_of(emoji, tmp_path)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(split_files, "sha256_of", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ExportError, match="No space left on device"):
        mfcompile.export_onnx(emoji.pruned, copy, split="regions", regions=emoji.regions)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_file_is_no_place_for_parts(emoji: Split, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a split model is several files, and .* names one"):
        mfcompile.export_onnx(emoji.pruned, tmp_path / "model.onnx", split="regions", regions=emoji.regions)
    with pytest.raises(InputError, match="split='towers' is not known"):
        mfcompile.export_onnx(emoji.pruned, tmp_path / "parts", split="towers", regions=emoji.regions)


FAMILIES = {
    "clip": (["text", "vision", "fusion"], {"image_embeds", "text_embeds"}),
    "blip_itm": (["text", "vision", "fusion"], {"last_hidden_state", "text_features"}),
    "blip_cap": (["text", "vision", "fusion"], {"image_embeds", "text_features"}),
    "blip2": (["text", "vision", "fusion"], {"vision_features", "text_features", "text_mask"}),
    "llava": (["text", "vision", "fusion"], {"image_hidden_states", "text_features", "text_mask"}),
    "florence": (["text", "vision", "fusion"], {"vision_features", "text_features_1", "text_mask", "text_features_2"}),
    "mllama": (["text", "vision", "fusion"], {"vision_features", "text_features"}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_parts(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.zoo import families

    torch.manual_seed(0)
    module, inputs = getattr(families, family)()
    split = build(module, inputs, tmp_path)
    names, crossings = FAMILIES[family]
    assert [part.name for part in split.manifest.parts] == names
    assert {item.name for part in split.manifest.parts for item in part.inputs if item.part} == crossings
    for part in split.manifest.parts[:-1]:
        assert {item.modality for item in part.inputs} <= {part.name, None}, "a tower reads its own modality and control"
    assert_parts_equal_whole(split)
    assert_files_are_sound(split, tmp_path)


class Looks(nn.Module):
    """Gives the image's features alone, whatever it made of the text; as BLIP's question answering does without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.text = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.vision = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        words = self.table(input_ids)
        for layer in self.text:
            words = layer(words)
        for layer in self.vision:
            pixel_values = layer(pixel_values).relu()
        return {"image_embeds": pixel_values}


def test_a_model_whose_outputs_one_modality_makes_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(20, (2, 5)), "pixel_values": torch.randn(2, 4, 16)}
    with pytest.raises(ExportError, match="all of it is vision, although it has inputs of text and vision"):
        build(Looks(), inputs, tmp_path)
    assert not (tmp_path / "parts").exists()
