"""A .pt2 archive as input: names, regions and masks are those of the module that was exported."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import mfcompile
from mfcompile.errors import InputError
from mfcompile.frontends.program_module import program_module
from mfcompile.frontends.pt2 import load_pt2
from mfcompile.frontends.sources import load_source
from tests.models import tiny_vlm, vlm_batch

FREE = {
    "pixel_values": {0: Dim.AUTO},
    "input_ids": {0: Dim.AUTO, 1: Dim.AUTO},
    "attention_mask": {0: Dim.AUTO, 1: Dim.AUTO},
}


@functools.cache
def program(free: bool = True) -> torch.export.ExportedProgram:
    return torch.export.export(tiny_vlm().eval(), (), vlm_batch(), dynamic_shapes=FREE if free else None, strict=False)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.export.save(program(), tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_names_regions_and_masks_are_those_of_the_module(archive: Path) -> None:
    source = load_source(archive)
    assert source.kind == "pt2"
    assert [name for name, _ in source.model.named_parameters()] == [name for name, _ in tiny_vlm().named_parameters()]
    found = mfcompile.compile_pruned(source.model, source.example_inputs, sparsity=0.5)
    expected = mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), sparsity=0.5)
    assert [(site.name, site.region) for site in found.regions.pruned_sites] == [
        (site.name, site.region) for site in expected.regions.pruned_sites
    ]
    assert found.masks == expected.masks
    blocks = {use.block for uses in expected.regions.evidence.values() for use in uses}
    assert {use.block for uses in found.regions.evidence.values() for use in uses} == blocks
    assert found.report["model"]["class"] == "TinyVlm"
    one, other = found.module(**vlm_batch()), expected.module(**vlm_batch())
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_onnx_is_made_from_that_program_and_agrees(archive: Path, tmp_path: Path) -> None:
    source = load_source(archive)
    compiled = mfcompile.compile_pruned(source.model, source.example_inputs, sparsity=0.5)
    assert compiled.captured.exported is not None
    assert compiled.captured.exported.program is source.model.held.program  # type: ignore[union-attr]
    artifact = compiled.export_onnx(tmp_path / "model.onnx")
    assert artifact.dynamic_axes["input_ids"].keys() == {0, 1}
    assert artifact.dynamic_axes["pixel_values"].keys() == {0}
    assert compiled.verify(artifact).passed


def test_the_pruned_program_is_saved_again(archive: Path, tmp_path: Path) -> None:
    source = load_source(archive)
    compiled = mfcompile.compile_pruned(source.model, source.example_inputs, sparsity=0.5)
    compiled.save(tmp_path / "out", onnx=False)
    again = load_source(tmp_path / "out" / "model.pt2")
    weights = dict(again.model.named_parameters())
    for fqn, mask in compiled.masks.items():
        assert not weights[fqn][~mask].any()
        assert torch.equal(weights[fqn][mask], dict(source.model.named_parameters())[fqn][mask])
    for name, tensor in compiled.module(**vlm_batch()).items():
        torch.testing.assert_close(again.model(**vlm_batch())[name], tensor)


def test_other_batch_sizes_run(archive: Path) -> None:
    model = load_source(archive).model
    larger = {name: tensor.repeat_interleave(2, 0) for name, tensor in vlm_batch().items()}
    for name, tensor in tiny_vlm().eval()(**larger).items():
        torch.testing.assert_close(model(**larger)[name], tensor)


class Odd(nn.Module):
    """Positional and keyword inputs, a module that is called twice, a tied weight, a sequential stack."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.stack = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor, *, extra: dict[str, Tensor], flag: bool = False) -> tuple[Tensor, Tensor]:
        states = self.stack(self.stack(self.words(input_ids))) + extra["bias"]
        return self.head(states), states if flag else states * 2


def test_positional_inputs_repeated_calls_and_tied_weights(tmp_path: Path) -> None:
    model = Odd().eval()
    args, kwargs = (torch.randint(0, 20, (2, 5)),), {"extra": {"bias": torch.rand(2, 5, 8)}, "flag": True}
    torch.export.save(torch.export.export(model, args, kwargs, strict=False), tmp_path / "odd.pt2")
    source = load_pt2(tmp_path / "odd.pt2")
    found = source.model(*args, **kwargs)
    for one, other in zip(found, model(*args, **kwargs), strict=True):
        torch.testing.assert_close(one, other)
    assert isinstance(source.model.stack, nn.Sequential)
    assert source.model.head.weight is source.model.words.weight  # type: ignore[union-attr]
    captured = mfcompile.capture(source.model, source.example_inputs)
    assert [spec.name for spec in captured.inputs] == ["input_ids", "extra.bias"]
    plain = mfcompile.capture(model, {"input_ids": args[0], **kwargs})
    modalities = {"extra.bias": "control"}
    uses = mfcompile.infer_regions(captured, modalities=modalities).evidence["stack.0.weight"]
    assert [use.stack for use in uses] == [
        use.stack for use in mfcompile.infer_regions(plain, modalities=modalities).evidence["stack.0.weight"]
    ]
    assert len(uses) == 2


def test_a_program_itself_can_be_captured() -> None:
    captured = mfcompile.capture(program(), vlm_batch())  # type: ignore[arg-type]
    assert captured.exported is not None
    assert captured.exported.route == "the .pt2 archive"


def test_an_archive_without_example_inputs_is_refused_with_advice(tmp_path: Path) -> None:
    bare = torch.export.export(tiny_vlm().eval(), (), vlm_batch(), strict=False)
    bare._example_inputs = None
    torch.export.save(bare, tmp_path / "bare.pt2")
    model = load_source(tmp_path / "bare.pt2").model
    with pytest.raises(InputError, match=r"holds no example inputs, and none were given.*model = torch\.export\.load"):
        mfcompile.capture(model, None)
    compiled = mfcompile.compile_pruned(model, vlm_batch(), sparsity=0.5)
    assert compiled.masks == mfcompile.compile_pruned(tiny_vlm(), vlm_batch(), sparsity=0.5).masks
    assert compiled.captured.exported is not None
    assert compiled.captured.exported.input_names == tuple(vlm_batch())


def test_a_model_py_may_define_a_program(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        f"import torch\nmodel = torch.export.load({str(archive)!r})\nexample_inputs = {{}}\n", encoding="utf-8"
    )
    found = load_source(tmp_path / "model.py").model
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in tiny_vlm().named_parameters()]


def rewritten(archive: Path, change: Any) -> Path:
    target = archive.with_name("changed.pt2")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return target


class Dangerous:
    def __reduce__(self) -> Any:
        raise AssertionError("never pickled")


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: (name, data.replace(b'"use_pickle": false', b'"use_pickle": true ')),
        lambda name, data: (name, b"cbuiltins\nprint\n(S'run'\ntR." if "sample_inputs" in name else data),
        lambda name, data: (name.replace("model_weights_config.json", "model.pt"), data),
    ],
)
def test_pickled_objects_are_refused_before_torch_sees_them(
    archive: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=r"holds a pickled object \(data/.*\): loading it can run any code"):
        load_source(rewritten(archive, change))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("nothing")
    with pytest.raises(InputError, match=r"text\.pt2 is no archive of torch\.export .*Write one with torch\.export\.save"):
        load_source(tmp_path / "text.pt2")
    with zipfile.ZipFile(tmp_path / "empty.pt2", "w") as file:
        file.writestr("empty/data/version", "1")
    with pytest.raises(InputError, match=r"empty\.pt2 cannot be loaded by torch\.export\.load"):
        load_source(tmp_path / "empty.pt2")


def test_copies_share_the_program() -> None:
    import copy

    model = program_module(program())
    assert copy.deepcopy(model).held is model.held


def test_output_classes_of_transformers_are_known_in_a_process_of_its_own(tmp_path: Path) -> None:
    """In this process the class is known already: whoever loads the archive has not built the model."""
    import subprocess
    import sys

    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.ViTModel(config).eval()
    exported = torch.export.export(model, (), {"pixel_values": torch.rand(2, 3, 16, 16)}, strict=False)
    torch.export.save(exported, tmp_path / "vit.pt2")
    code = (
        "import mfcompile\nfrom mfcompile.frontends.sources import load_source\n"
        f"source = load_source({str(tmp_path / 'vit.pt2')!r})\n"
        "print(*mfcompile.capture(source.model, source.example_inputs).output_names)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["last_hidden_state", "pooler_output"], ran.stderr
