import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mfcompile
from mfcompile.errors import InputError
from mfcompile.frontends.sources import load_source
from mfcompile.inputs import normalize_inputs, output_tensors

transformers: Any = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_SIZES, "image_size": 30, "patch_size": 15}  # four patches
_TEXT = {**_SIZES, "vocab_size": 99}
_IMAGE_TOKEN = 97  # not among the words that a random sentence is made of


def _clip() -> nn.Module:
    text = {**_TEXT, "bos_token_id": 1, "eos_token_id": 98, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    return transformers.CLIPModel(config)  # type: ignore[no-any-return]


def _siglip() -> nn.Module:
    config = transformers.SiglipConfig(text_config=_TEXT, vision_config=_VISION)
    return transformers.SiglipModel(config)  # type: ignore[no-any-return]


def _blip_config() -> Any:
    return transformers.BlipConfig(text_config={**_TEXT, "encoder_hidden_size": 16}, vision_config=_VISION)


def _vilt() -> nn.Module:
    return transformers.ViltModel(transformers.ViltConfig(**_VISION, vocab_size=99))  # type: ignore[no-any-return]


def _llava() -> nn.Module:
    text = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, pad_token_id=0)
    vision = transformers.CLIPVisionConfig(**_VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=_IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def _flava() -> nn.Module:
    config = transformers.FlavaConfig(image_config=_VISION, text_config=_TEXT, multimodal_config=_SIZES)
    return transformers.FlavaModel(config)  # type: ignore[no-any-return]


def _bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**_TEXT))  # type: ignore[no-any-return]


def _vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(**_VISION))  # type: ignore[no-any-return]


def _whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config)  # type: ignore[no-any-return]


_IMAGE, _IDS = (2, 3, 30, 30), (2, 12)
_TABLE: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = {
    "clip": (_clip, {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS}),
    "siglip": (_siglip, {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS}),
    "blip-retrieval": (
        lambda: transformers.BlipForImageTextRetrieval(_blip_config()),
        {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS},
    ),
    "blip-vqa": (
        lambda: transformers.BlipForQuestionAnswering(_blip_config()),
        {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS, "decoder_input_ids": (2, 6)},
    ),
    "blip-caption": (
        lambda: transformers.BlipForConditionalGeneration(_blip_config()),
        {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS},
    ),
    "vilt": (_vilt, {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS}),
    "llava": (_llava, {"pixel_values": _IMAGE, "input_ids": (2, 16), "attention_mask": (2, 16)}),
    "flava": (_flava, {"pixel_values": _IMAGE, "input_ids": _IDS, "attention_mask": _IDS}),
    "bert": (_bert, {"input_ids": _IDS, "attention_mask": _IDS}),
    "vit": (_vit, {"pixel_values": _IMAGE}),
    "whisper": (_whisper, {"input_features": (2, 8, 40), "decoder_input_ids": (2, 6)}),
}


def _save(folder: Path, build: Callable[[], nn.Module], **options: Any) -> Path:
    torch.manual_seed(0)
    model: Any = build()
    model.save_pretrained(folder, **options)
    return folder


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_source(path)
    return str(caught.value)


def _run(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # some models draw random numbers in eval mode too
    with torch.no_grad():
        return output_tensors(normalize_inputs(model, inputs).call(model))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", _TABLE)
def test_synthesised_inputs(name: str, tmp_path: Path) -> None:
    build, shapes = _TABLE[name]
    torch.manual_seed(0)
    saved: Any = build()
    saved.save_pretrained(tmp_path)
    source = load_source(tmp_path)

    assert (source.kind, source.path, source.calibration, source.evaluate) == ("huggingface", tmp_path, None, None)
    assert type(source.model) is type(saved)
    assert not source.model.training
    assert {key: tuple(value.shape) for key, value in source.example_inputs.items()} == shapes
    found, expected = (_run(model, source.example_inputs) for model in (source.model, saved.eval()))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    assert any(note.startswith("example inputs were synthesised from config.json: ") for note in source.notes)
    assert "a Hugging Face directory holds no calibration data" in source.notes
    assert not any(note.startswith("tried before that") for note in source.notes), "the first inputs fit"


def test_ids_are_words_between_start_and_end_and_rows_differ_in_length(tmp_path: Path) -> None:
    inputs = load_source(_save(tmp_path, _clip)).example_inputs
    assert inputs["attention_mask"].sum(1).tolist() == [12, 8]
    for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
        length = sum(mask)
        assert mask == [1] * length + [0] * (len(mask) - length), "padding is on the right"
        assert ids[0] == 1
        assert ids[length - 1] == 98
        assert not {0, 1, 98} & set(ids[1 : length - 1])
        assert set(ids[length:]) <= {0}


def test_words_are_no_special_tokens(tmp_path: Path) -> None:
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 4, "sep_token_id": 5, "mask_token_id": 6}
    config = transformers.BertConfig(**{**_TEXT, "vocab_size": 10, **special, "stop_token_ids": [7]})
    ids = load_source(_save(tmp_path, lambda: transformers.BertModel(config))).example_inputs["input_ids"]
    assert set(ids[0, 1:-1].tolist()) == {1, 8}


def test_image_tokens_are_as_many_as_image_features(tmp_path: Path) -> None:
    ids = load_source(_save(tmp_path, _llava)).example_inputs["input_ids"]
    assert (ids == _IMAGE_TOKEN).sum(1).tolist() == [4, 4]


def test_the_same_inputs_every_time_and_the_global_generator_untouched(tmp_path: Path) -> None:
    _save(tmp_path, _vilt)  # draws random numbers in its forward
    first = load_source(tmp_path).example_inputs
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = load_source(tmp_path).example_inputs
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first["pixel_values"], second["pixel_values"], rtol=0, atol=0)
    assert not torch.equal(first["pixel_values"][0], first["pixel_values"][1])


def test_weights_are_float32_and_shards_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved: Any = _bert().half()
    saved.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    loaded = load_source(tmp_path).model
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value.float(), rtol=0, atol=0)


def test_an_unknown_architecture_gives_the_base_model_and_that_is_said(tmp_path: Path) -> None:
    _edit_config(_save(tmp_path, _vit), architectures=["ViTForMyProject"])
    source = load_source(tmp_path)
    assert type(source.model) is transformers.ViTModel
    assert (
        "config.json names ViTForMyProject, which transformers does not have: the base model of its type was loaded (AutoModel)"
    ) in source.notes


def test_random_and_unused_weights_are_said(tmp_path: Path) -> None:
    _edit_config(_save(tmp_path, _bert), architectures=["BertForMaskedLM"])
    notes = "\n".join(load_source(tmp_path).notes)
    assert re.search(r"not among the saved weights, so random: .*cls\.predictions", notes)
    assert re.search(r"saved weights that BertForMaskedLM does not use, left out: .*pooler", notes)


# A processor beside the model


def _word_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "two", "red", "apples", "a", "small", "brown", "dog"]
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def test_a_processor_is_preferred(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    _save(tmp_path, lambda: transformers.BlipForImageTextRetrieval(_blip_config()))
    images = transformers.BlipImageProcessor(size={"height": 30, "width": 30})
    transformers.BlipProcessor(images, _word_tokenizer()).save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert source.example_inputs["input_ids"][1, :3].tolist() == [2, 3, 4]
    assert source.example_inputs["attention_mask"].sum(1).tolist() == [11, 3]
    assert source.example_inputs["pixel_values"].shape == _IMAGE
    assert source.notes[0].startswith("example inputs were synthesised from two synthetic samples through its BlipProcessor: ")


def test_a_processor_that_puts_image_tokens_into_the_text(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    tokenizer = _word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    token = tokenizer.convert_tokens_to_ids("<image>")
    _edit_config(_save(tmp_path, _llava), image_token_index=token)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=15,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    source = load_source(tmp_path)
    assert "through its LlavaProcessor: " in source.notes[0]
    assert (source.example_inputs["input_ids"] == token).sum(1).tolist() == [4, 4]


def test_a_tokenizer_alone_gives_the_text(tmp_path: Path) -> None:
    _word_tokenizer().save_pretrained(_save(tmp_path, _clip))
    inputs = load_source(tmp_path).example_inputs
    assert inputs["input_ids"][1, :3].tolist() == [2, 3, 4]
    assert inputs["pixel_values"].shape == _IMAGE


def test_a_tokenizer_and_an_image_processor_without_a_processor_are_joined(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    _word_tokenizer().save_pretrained(_save(tmp_path, _clip))
    transformers.ViTImageProcessor(size={"height": 30, "width": 30}).save_pretrained(tmp_path)
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "processor_class": "NoSuchProcessor"}))
    source = load_source(tmp_path)
    assert source.example_inputs["input_ids"][1, :3].tolist() == [2, 3, 4]
    assert source.example_inputs["pixel_values"].abs().max() <= 1, "an image, not Gaussian noise"
    assert re.search(r"samples through its \w*Tokenizer\w* and ViTImageProcessor", source.notes[0])


def test_a_processor_that_does_not_fit_the_model_is_said_and_the_config_used(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    transformers.ViTImageProcessor(size={"height": 45, "width": 45}).save_pretrained(_save(tmp_path, _vit))
    source = load_source(tmp_path)
    assert source.example_inputs["pixel_values"].shape == _IMAGE
    assert any(note.startswith("tried before that: two synthetic samples through its") for note in source.notes)


def test_a_broken_processor_is_said_and_the_config_used(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "preprocessor_config.json").write_text("{")
    source = load_source(tmp_path)
    assert source.example_inputs["pixel_values"].shape == _IMAGE
    assert any("the processor files in the directory, which cannot be loaded" in note for note in source.notes)


# What is saved beside pruned weights


def test_extras_make_a_directory_that_reloads_in_float32(tmp_path: Path) -> None:
    source_dir, target = tmp_path / "source", tmp_path / "target"
    torch.manual_seed(0)
    saved: Any = _bert().half()
    saved.save_pretrained(source_dir)
    _word_tokenizer().save_pretrained(source_dir)
    for name in ("LICENSE", "pytorch_model.bin", "report.json", "adapter_config.json"):
        (source_dir / name).write_text(name)
    target.mkdir()
    (target / "tokenizer_config.json").write_text("mine")

    source = load_source(source_dir)
    assert source.save_extras is not None
    source.save_extras(target)
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE"} <= names
    assert not names & {"pytorch_model.bin", "model.safetensors", "report.json", "adapter_config.json"}
    assert (target / "tokenizer_config.json").read_text() == "mine"
    shutil.copy(source_dir / "model.safetensors", target)
    reloaded = transformers.AutoModel.from_pretrained(target)
    assert type(reloaded) is transformers.BertModel
    assert reloaded.dtype == torch.float32
    assert json.loads((target / "config.json").read_text())["architectures"] == ["BertModel"]


# Refusals


def test_no_weights(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "model.safetensors").unlink()
    assert _refusal(tmp_path) == (
        f"{tmp_path} holds config.json but no weights (*.safetensors): there is nothing to prune. "
        f"Fetch the weights into it, or name the directory that save_pretrained wrote. Its regions can be seen without them: "
        f"mfcompile inspect {tmp_path} --no-weights"
    )


@pytest.mark.parametrize("build", [_clip, _llava])
def test_a_directory_without_weights_gives_a_plan(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    directory = _save(tmp_path, build)
    whole = load_source(directory)
    expected = mfcompile.infer_regions(mfcompile.capture(whole.model, whole.example_inputs))
    (directory / "model.safetensors").unlink()
    source = load_source(directory, weights=False)
    assert {parameter.device.type for parameter in source.model.parameters()} == {"meta"}
    assert "no weights were loaded: this is a plan, and nothing can be pruned with it" in source.notes
    plan = mfcompile.infer_regions(mfcompile.capture(source.model, source.example_inputs))
    assert plan.sites == expected.sites
    assert dict(plan.weights) == dict(expected.weights)
    with pytest.raises(InputError, match=r"parameters without values .*Load the weights first"):
        mfcompile.compile_pruned(source.model, source.example_inputs)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = _refusal(tmp_path)
    assert "holds its weights only as a pickled file, pytorch_model.bin: loading it can run any code" in message
    assert "Convert it to safetensors once" in message


def test_weights_under_another_name(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    message = _refusal(tmp_path)
    assert "only model.fp16.safetensors. Rename the file with the weights to model.safetensors" in message


def test_a_missing_shard(tmp_path: Path) -> None:
    shard = next(_save(tmp_path, _bert, max_shard_size="8KB").glob("model-00002-*.safetensors"))
    shard.unlink()
    assert f"{shard} is missing: model.safetensors.index.json lists it among the weights" in _refusal(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    weights = _save(tmp_path, _vit) / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert _refusal(tmp_path) == f"{weights} is a Git LFS pointer, not the weights. Run `git lfs pull` in {tmp_path}"


def test_damaged_weights(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "model.safetensors").write_bytes(b"\x08\x00")
    assert f"ViTModel cannot be loaded from {tmp_path}: SafetensorError" in _refusal(tmp_path)


def test_weights_of_another_size(tmp_path: Path) -> None:
    _edit_config(_save(tmp_path, _vit), hidden_size=32)
    message = _refusal(tmp_path)
    assert f"ViTModel cannot be loaded from {tmp_path}: RuntimeError" in message
    assert "Check that config.json belongs to these weights" in message


def test_weights_of_another_model(tmp_path: Path) -> None:
    other = _save(tmp_path / "other", _clip)
    shutil.copy(other / "model.safetensors", _save(tmp_path / "bert", _bert))
    assert "hold none of the parameters of BertModel" in _refusal(tmp_path / "bert")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, not a JSON object"),
    ],
)
def test_damaged_config(tmp_path: Path, text: str, problem: str) -> None:
    (_save(tmp_path, _vit) / "config.json").write_text(text)
    assert f"{tmp_path / 'config.json'} {problem}" in _refusal(tmp_path)


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    (_save(tmp_path, _vit) / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _edit_config(tmp_path, model_type="custom", auto_map={"AutoConfig": "custom.CustomConfig"})
    assert "asks for Python code from the directory (auto_map), which mfcompile does not run" in _refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_type(tmp_path: Path) -> None:
    _edit_config(_save(tmp_path, _vit), model_type="no-such-type")
    assert re.search(r"transformers [\d.]+ cannot use .*config.json \(model_type 'no-such-type'\)", _refusal(tmp_path))


def test_a_model_that_runs_with_nothing_tried(tmp_path: Path) -> None:
    build = lambda: transformers.BertForMultipleChoice(transformers.BertConfig(**_TEXT))  # noqa: E731
    message = _refusal(_save(tmp_path, build))
    assert message.startswith(f"no example inputs could be synthesised for BertForMultipleChoice in {tmp_path}. Tried: ")
    assert "config.json, input_ids (2, 12) int64, attention_mask (2, 12) int64: " in message
    assert "Write a model.py instead: model = BertForMultipleChoice.from_pretrained(" in message
