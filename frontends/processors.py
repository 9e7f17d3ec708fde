"""Example inputs through the processor or tokenizer that lies beside a transformers model."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
_IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_SENTENCES = ("a small brown dog runs along the beach near the water", "two red apples")
_IMAGE_HEIGHT, _IMAGE_WIDTH = 240, 320


def processor_inputs(directory: Path, failures: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Two synthetic images and sentences through the directory's processor, in each way that it accepts.

    Args:
        directory: a Hugging Face directory; nothing is given when it holds no processor files.
        failures: what went wrong is appended here, in words.

    Yields:
        How the inputs were made, and the inputs; more than one pair where the processor may be called in several ways.
    """
    transformers: Any = importlib.import_module("transformers")
    processors = _load_processors(transformers, directory, failures)
    if not processors:
        return
    how = f"two synthetic samples through its {' and '.join(type(processor).__name__ for processor in processors)}"
    problems = []
    ways = [_calls(processor, transformers.PreTrainedTokenizerBase) for processor in processors]
    for calls in zip(*ways, strict=True):  # a tokenizer or an image processor alone has one way
        inputs: dict[str, Any] = {}
        try:
            for call in calls:
                inputs |= _plain(call())
        except Exception as error:  # a processor is foreign code
            problems.append(describe_error(error))
            continue
        yield how, inputs
    if problems:
        failures.append(f"{how}, which raised {problems[0]}")


def _load_processors(transformers: Any, directory: Path, failures: list[str]) -> list[Any]:
    """The processor, or else the tokenizer and the image processor, as far as the directory holds their files."""
    has_tokenizer, has_images = (
        any((directory / name).is_file() for name in names) for names in (_TOKENIZER_FILES, _IMAGE_PROCESSOR_FILES)
    )
    options = {"local_files_only": True, "trust_remote_code": False}
    if not (has_tokenizer or has_images):
        return []
    problem = ""
    processor = None
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(directory), **options)
    except Exception as error:  # missing files, missing packages, unknown classes
        problem = describe_error(error)
    if isinstance(processor, transformers.ProcessorMixin):
        return [processor]
    found = []  # AutoProcessor gives a tokenizer or an image processor alone when it does not know how to join them
    for is_there, loader in ((has_tokenizer, transformers.AutoTokenizer), (has_images, transformers.AutoImageProcessor)):
        if is_there:
            try:
                found.append(loader.from_pretrained(str(directory), **options))
            except Exception as error:  # as above
                problem = describe_error(error)
    if not found:
        failures.append(f"the processor files in the directory, which cannot be loaded: {problem}")
    return found


def _calls(processor: Any, tokenizer_class: Any) -> list[Callable[[], Any]]:
    """Ways to call a processor, the most specific first."""
    images = [_image(0), _image(1)]
    options = {"padding": True, "return_tensors": "pt"}
    is_tokenizer = isinstance(processor, tokenizer_class)
    tokenizer: Any = processor if is_tokenizer else getattr(processor, "tokenizer", None)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_tokenizer:
        return [lambda: processor(list(_SENTENCES), **options)]
    if tokenizer is None:
        return [lambda: processor(images=images, return_tensors="pt")]
    token = getattr(processor, "image_token", None)
    marked = [f"{token}\n{text}" if isinstance(token, str) else text for text in _SENTENCES]
    calls: list[Callable[[], Any]] = [
        lambda: processor(images=images, text=marked, **options),
        lambda: processor(images=[[image] for image in images], text=marked, **options),
    ]
    if getattr(processor, "chat_template", None):
        calls.insert(0, lambda: _chat(processor, images, options))
    return calls


def _chat(processor: Any, images: list[Any], options: Mapping[str, Any]) -> Any:
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in _SENTENCES
    ]
    return processor(images=images, text=prompts, **options)


def _image(seed: int) -> Any:
    """A PIL image of smooth random colours; a uint8 array (height, width, 3) where Pillow is not installed."""
    coarse = torch.rand((1, 3, 6, 8), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (_IMAGE_HEIGHT, _IMAGE_WIDTH), mode="bilinear")
    pixels = (smooth[0].permute(1, 2, 0) * 255).to(torch.uint8).numpy()
    try:
        from PIL import Image
    except ImportError:
        return pixels
    return Image.fromarray(pixels)


def _plain(output: Any) -> dict[str, Any]:
    """The tensors of a BatchFeature or BatchEncoding, floating ones in float32."""
    tensors = {str(name): value for name, value in dict(output).items() if isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def describe_error(error: Exception) -> str:
    """The kind of the error and the first line of its message."""
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {first}"
