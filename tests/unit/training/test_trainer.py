"""The Trainer of transformers trains masked models; what it writes needs no mfcompile to be read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mfcompile
from mfcompile.masks import MaskSet, PackedMask
from tests.masked_models import assert_pruned

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def clip() -> Any:
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))


def blip() -> Any:
    """Captioning: the word embeddings are tied to the decoder's output."""
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 12, "encoder_hidden_size": 8, "bos_token_id": 48}
    text |= {"eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=8, image_text_hidden_size=8)
    )


MODELS: dict[str, Callable[[], Any]] = {"clip": clip, "blip": blip}


def masks_for(model: nn.Module) -> MaskSet:
    """Masks over all linear weights of layers, and over a tied embedding where there is one."""
    generator = torch.Generator().manual_seed(1)
    packed = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("layer" in name or "word_embeddings" in name):
            packed[name] = PackedMask.pack(torch.rand(parameter.shape, generator=generator) > 0.6)
    return MaskSet(packed, sparsity=0.6)


class Pairs(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 48, (6,), generator=generator)
        ids[-1] = 49
        return {
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }


class Learner(transformers.Trainer):  # type: ignore[misc]
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        own = {"return_loss": True} if "logit_scale" in dict(model.named_parameters()) else {"labels": inputs["input_ids"]}
        output = model(**inputs, **own)
        return (output.loss, output) if return_outputs else output.loss


def learner(model: Any, folder: Path, masks: Any = None, **options: Any) -> Any:
    settings = {
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "report_to": [],
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, use_cpu=True, seed=3, **(settings | options)
    )
    return Learner(model=model, args=arguments, train_dataset=Pairs(), callbacks=[mfcompile.MaskCallback(masks)])


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_are_plain_and_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    dense = MODELS[name]()
    masks = masks_for(dense)
    model: Any = mfcompile.mask_module(dense, masks)
    before = {fqn: value.clone() for fqn, value in model.state_dict().items()}
    learner(model, tmp_path / "run").train()
    after = model.state_dict()
    assert_pruned(model, masks)
    assert all((after[fqn] != before[fqn])[mask].any() for fqn, mask in masks.items())
    checkpoint = tmp_path / "run" / "checkpoint-1"
    stored = load_file(checkpoint / "model.safetensors")
    assert not [fqn for fqn in stored if "parametrizations" in fqn]
    assert mfcompile.MaskSet.load(checkpoint / "masks.safetensors") == masks
    last, information = type(dense).from_pretrained(tmp_path / "run" / "checkpoint-2", output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert_pruned(last, masks)
    assert all(torch.equal(value, after[fqn]) for fqn, value in last.state_dict().items())
    assert all(torch.equal(value, mfcompile.load(checkpoint).state_dict()[fqn]) for fqn, value in stored.items())
    resumed: Any = mfcompile.mask_module(MODELS[name](), masks)
    learner(resumed, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, after[fqn]) for fqn, value in resumed.state_dict().items())


def test_a_model_that_from_pretrained_loaded_gets_its_masks(tmp_path: Path) -> None:
    masks = masks_for(clip())
    model: Any = mfcompile.mask_module(clip(), masks)
    model.save_pretrained(tmp_path / "pruned")  # of the masked module itself
    path = masks.save(tmp_path / "masks.safetensors")
    plain = transformers.CLIPModel.from_pretrained(tmp_path / "pruned")
    trainer = learner(plain, tmp_path / "run", path, bf16=True, gradient_accumulation_steps=2)
    assert mfcompile.masks_of(plain) == masks
    trainer.train()
    assert_pruned(plain, masks)
    trainer.save_model(str(tmp_path / "final"))
    assert_pruned(transformers.CLIPModel.from_pretrained(tmp_path / "final"), masks)
    stripped: Any = mfcompile.strip(plain)
    stripped.save_pretrained(tmp_path / "stripped")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("final", "stripped"))
    assert set(first) == set(second)
    assert all(torch.equal(first[fqn], second[fqn]) for fqn in first)


WITHOUT_MFCOMPILE = """
import sys
from pathlib import Path
sys.modules["mfcompile"] = None
import torch
from transformers import BlipForConditionalGeneration
folder = Path(sys.argv[1])
model, found = BlipForConditionalGeneration.from_pretrained(folder / "shards", output_loading_info=True)
assert not any(found.values()), found
weights = dict(model.named_parameters(remove_duplicate=False))
masks = torch.load(folder / "masks.pt", weights_only=True)
print(sum(int((weights[name][~mask] == 0).sum()) for name, mask in masks.items()))
with torch.no_grad():
    torch.save(model.eval()(**torch.load(folder / "inputs.pt", weights_only=True)).logits, folder / "logits.pt")
"""


def test_shards_of_a_tied_model_are_read_where_there_is_no_mfcompile(tmp_path: Path) -> None:
    masks = masks_for(blip())
    model: Any = mfcompile.mask_module(blip(), masks)
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.NAdam(model.train().parameters(), lr=0.01, weight_decay=0.1)
    inputs = {name: value[None] for name, value in Pairs()[0].items()}
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    torch.save(dict(masks.items()), tmp_path / "masks.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", WITHOUT_MFCOMPILE, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) == masks.weight_count - masks.kept_count
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), model(**inputs).logits)


def test_a_retrieval_model_hands_its_masks_to_captioning_and_to_answering() -> None:
    captioner, config = blip(), blip().config
    retrieval, answering = transformers.BlipForImageTextRetrieval(config), transformers.BlipForQuestionAnswering(config)
    found = masks_for(retrieval)
    masks = MaskSet({fqn: packed for fqn, packed in found.packed.items() if ".layer" in fqn})
    to_captions = mfcompile.transfer_masks(masks, captioner, strict=True)
    sources = {fqn.replace("text_decoder.bert.", "text_encoder.") for fqn in to_captions.matched}
    assert sources == set(masks) == set(to_captions.matched.values())
    assert all(source == fqn.replace("text_decoder.bert.", "text_encoder.") for fqn, source in to_captions.matched.items())
    assert "text_decoder.cls.predictions.transform.dense.weight" in to_captions.dense
    both = {"text_encoder": ["text_encoder", "text_decoder.bert"]}
    to_answers = mfcompile.transfer_masks(masks, answering, both, strict=True)
    assert set(masks) < set(to_answers.matched)
    text = [fqn for fqn in masks if fqn.startswith("text_encoder")]
    assert len(to_answers.matched) == len(masks) + len(text)
    assert_pruned(mfcompile.mask_module(answering, to_answers.masks), to_answers.masks)


def test_a_directory_names_its_model_and_dtype(tmp_path: Path) -> None:
    model = clip().to(torch.bfloat16)
    masks = masks_for(model)
    path = mfcompile.save(mfcompile.mask_module(model, masks), tmp_path / "pruned")
    found: Any = mfcompile.load(path)
    assert type(found) is transformers.CLIPModel
    assert found.dtype == torch.bfloat16
    assert mfcompile.masks_of(found) == masks
    inputs = {name: value[None] for name, value in Pairs()[0].items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.inference_mode():
        expected = mfcompile.strip(mfcompile.mask_module(model, masks)).eval()(**inputs).logits_per_image
        assert torch.equal(found(**inputs).logits_per_image, expected)


def test_a_model_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mfcompile.InputError, match=r"CLIPModel has no masks in force: train compiled\.module"):
        learner(clip(), tmp_path)
    masks = masks_for(clip())
    other = MaskSet({fqn: PackedMask.pack(~mask) for fqn, mask in masks.items()})
    with pytest.raises(mfcompile.MaskError, match="other masks in force than those that MaskCallback was given"):
        learner(mfcompile.mask_module(clip(), masks), tmp_path, other)


def test_without_transformers_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import mfcompile
try:
    mfcompile.MaskCallback()
except mfcompile.InputError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'mfcompile[transformers]' accelerate" in found.stdout


def test_masks_that_were_taken_off_in_training_are_noticed(tmp_path: Path) -> None:
    masks = masks_for(clip())
    model: Any = mfcompile.mask_module(clip(), masks)
    trainer = learner(model, tmp_path, masks, save_strategy="no")

    class Careless(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                mfcompile.strip(kwargs["model"]).get_parameter(next(iter(masks))).add_(1.0)

    trainer.add_callback(Careless)
    with pytest.raises(mfcompile.MaskError, match="pruned places are not zero, in 1 of"):
        trainer.train()
