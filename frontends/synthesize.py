"""Example inputs for a transformers model, from its config and the signature of its forward.

Nothing here goes by the name of a model. Ways are tried in order (a processor beside the model, then the config) and
each is judged by the only thing that counts: the model runs with them.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfcompile.errors import InputError
from mfcompile.frontends.processors import describe_error, processor_inputs
from mfcompile.frontends.without_weights import tolerating_no_values

Inputs = dict[str, Any]

BATCH_SIZE = 2  # one sample would let a capture specialise the batch dimension
_TEXT_LENGTH = 12
_DECODER_LENGTH = 6
_DEFAULT_IMAGE_SIZE = 224
_IMAGE_TOKEN = ("image_token_id", "image_token_index")
_IMAGE_TOKEN_COUNTS = ("num_query_tokens", "mm_tokens_per_image", "image_seq_length", "num_image_tokens")


def synthesize_inputs(model: nn.Module, directory: Path) -> tuple[Inputs, tuple[str, ...]]:
    """Inputs that the model runs with, and notes that say how they were made.

    Args:
        model: a transformers model in eval mode; run once or a few times, not changed.
        directory: where its config came from; a processor or tokenizer there is used.

    Returns:
        Keyword arguments of ``model.forward`` for a batch of two, and the notes.

    Raises:
        InputError: the model ran with none of the inputs tried; lists them with the model's errors.
    """
    failures: list[str] = []
    for how, inputs in _candidates(model, directory, failures):
        error = _try_forward(model, inputs)
        if error is None:
            notes = [f"example inputs were synthesised from {how}: {_describe(inputs)}"]
            notes += [f"tried before that: {failure}" for failure in failures]
            return inputs, tuple(notes)
        failures.append(f"{how}, {_describe(inputs)}: {describe_error(error)}")
    name, shown = type(model).__name__, failures[:4]
    more = [f"and {len(failures) - len(shown)} more"] if len(failures) > len(shown) else []
    raise InputError(
        f"no example inputs could be synthesised for {name} in {directory}. Tried: "
        f"{'; '.join([*shown, *more]) or 'nothing, since forward has no parameter of a known kind'}. "
        f"Parameters of forward that are required: {_required(model) or 'none'}. Write a model.py instead: "
        f"model = {name}.from_pretrained({str(directory)!r}) and example_inputs = {{...}}, and name that file"
    )


def _candidates(model: nn.Module, directory: Path, failures: list[str]) -> Iterator[tuple[str, Inputs]]:
    parameters = set(inspect.signature(model.forward).parameters)
    from_config = _config_candidates(model, parameters)
    first = next(from_config, {})
    # What a tokenizer or image processor alone does not give.
    rest = {name: value for name, value in first.items() if name not in ("input_ids", "attention_mask")}
    for how, inputs in processor_inputs(directory, failures):
        accepted = {name: value for name, value in inputs.items() if name in parameters}
        if accepted:
            yield how, {**rest, **accepted}
    for inputs in itertools.chain([first], from_config):
        if inputs:
            yield "config.json", inputs


def _try_forward(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        with torch.no_grad(), tolerating_no_values(model):
            model(**inputs)
    except Exception as error:  # the model's own code raises anything
        return error
    return None


def _config_candidates(model: nn.Module, parameters: set[str]) -> Iterator[Inputs]:
    """Inputs by what the config says, likelier ones first."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    images = _image_variants(config, parameters, generator)
    sounds = _audio_variants(config, parameters, generator)
    for image, sound in itertools.product(images, sounds):
        for placeholders in _placeholder_counts(model, config, parameters, image):
            text = _text_inputs(config, parameters, placeholders, generator)
            yield {**text, **image, **sound}


def _image_variants(config: Any, parameters: set[str], generator: torch.Generator) -> list[Inputs]:
    """Images: (2, channels, height, width), or with one more dimension, or as rows of flattened patches."""
    if "pixel_values" not in parameters:
        return [{}]
    vision = _section_with(config, "image_size") or _section_with(config, "patch_size") or config
    channels = _number(vision, "num_channels", "in_channels", "in_chans") or 3
    height, width = _image_size(vision)
    shapes: list[tuple[int, ...]] = [(BATCH_SIZE, channels, height, width)]
    frames = _number(vision, "num_frames") or _number(vision, "num_images")
    if frames is not None and frames > 1:
        shapes.insert(0, (BATCH_SIZE, frames, channels, height, width))
    shapes.append((BATCH_SIZE, 1, channels, height, width))
    variants: list[Inputs] = [{"pixel_values": torch.randn(shape, generator=generator)} for shape in shapes]
    if "image_sizes" in parameters:
        sizes = torch.tensor([[height, width]] * BATCH_SIZE)
        variants += [{**variant, "image_sizes": sizes} for variant in variants]
    if "image_grid_thw" in parameters:
        variants.insert(0, _patch_rows(vision, channels, generator))
    return variants


def _patch_rows(vision: Any, channels: int, generator: torch.Generator) -> Inputs:
    """Every patch of every image as a row: (2 * side * side, channels * frames * patch * patch)."""
    patch, frames = _number(vision, "patch_size") or 14, _number(vision, "temporal_patch_size") or 1
    side = 2 * (_number(vision, "spatial_merge_size") or 1)
    rows = torch.randn(BATCH_SIZE * side * side, channels * frames * patch * patch, generator=generator)
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, side, side]] * BATCH_SIZE)}


def _image_size(vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    return _DEFAULT_IMAGE_SIZE, _DEFAULT_IMAGE_SIZE


def _audio_variants(config: Any, parameters: set[str], generator: torch.Generator) -> list[Inputs]:
    """Spectrograms (2, bins, frames) or (2, frames, bins); waveforms (2, samples)."""
    bins_section = _section_with(config, "num_mel_bins") or config
    bins = _number(bins_section, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel") or 80
    if "input_features" in parameters:
        frames = _number(bins_section, "max_source_positions")
        shapes = [(BATCH_SIZE, 64, bins), (BATCH_SIZE, bins, 64)]
        if frames is not None:
            shapes.insert(0, (BATCH_SIZE, bins, 2 * frames))  # the usual stem halves the frames
        return [{"input_features": torch.randn(shape, generator=generator)} for shape in shapes]
    if "input_values" in parameters:
        waveform: tuple[int, ...] = (BATCH_SIZE, 4000)
        length = _number(bins_section, "max_length")
        shape = (BATCH_SIZE, length, bins) if length and hasattr(bins_section, "num_mel_bins") else waveform
        return [{"input_values": torch.randn(shape, generator=generator)}]
    return [{}]


def _placeholder_counts(model: nn.Module, config: Any, parameters: set[str], image: Inputs) -> list[int]:
    """How many image tokens the text of one sample may need; [0] when images do not stand in the text."""
    if not image or "input_ids" not in parameters or _image_token(config) is None:
        return [0]
    counts: list[int] = []
    features = _count_image_features(model, image)
    if features is not None:
        counts.append(features)
    for section in _sections(config):
        counts += [count for name in _IMAGE_TOKEN_COUNTS if (count := _number(section, name)) is not None]
    vision = _section_with(config, "image_size")
    patch = _number(vision, "patch_size") if vision is not None else None
    if vision is not None and patch:
        height, width = _image_size(vision)
        patches = (height // patch) * (width // patch)
        counts += [patches, patches + 1]
    return list(dict.fromkeys(count for count in counts if count > 0)) or [1]


def _count_image_features(model: nn.Module, image: Inputs) -> int | None:
    """Rows that the model's own ``get_image_features`` gives per image; None when it has none or does not say."""
    function: Any = getattr(model, "get_image_features", None)
    if function is None:
        return None
    known = inspect.signature(function).parameters
    try:
        with torch.no_grad():
            output = function(**{name: value for name, value in image.items() if name in known})
    except Exception:  # the forward that follows gives the error that is reported
        return None
    features = getattr(output, "pooler_output", output)
    if isinstance(features, Tensor) and features.ndim < 3 and "image_grid_thw" not in image:
        return None  # one vector per image: a pooled embedding, not tokens
    tensors = [features] if isinstance(features, Tensor) else list(features or ())
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return None
    rows = sum(tensor.shape[:-1].numel() for tensor in tensors)
    return rows // BATCH_SIZE if rows % BATCH_SIZE == 0 else None


def _text_inputs(config: Any, parameters: set[str], placeholders: int, generator: torch.Generator) -> Inputs:
    """Token ids (2, tokens) of two lengths, their mask, and decoder ids (2, tokens), where forward takes them."""
    inputs: Inputs = {}
    section = _text_section(config)
    if section is None:
        return inputs
    longest = _number(section, "max_position_embeddings", "n_positions") or _TEXT_LENGTH + 2
    length = max(4, min(_TEXT_LENGTH, longest - 2))  # some position tables start at an offset of two
    if "input_ids" in parameters:
        pad = _token(section, "pad_token_id") or 0
        rows = []
        for size in (length, length - length // 3):
            row = _sentence(config, section, size, placeholders, generator)
            rows.append(row + [pad] * (length + placeholders - len(row)))
        inputs["input_ids"] = torch.tensor(rows)
        lengths = torch.tensor([length, length - length // 3]) + placeholders
        if "attention_mask" in parameters:
            inputs["attention_mask"] = (torch.arange(length + placeholders) < lengths[:, None]).long()
        if "mm_token_type_ids" in parameters and placeholders:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == _image_token(config)).long()
    if "decoder_input_ids" in parameters:
        section = _decoder_section(config) or section
        start = _token(config, "decoder_start_token_id")
        if start is None:
            start = _token(section, "decoder_start_token_id", "bos_token_id", "pad_token_id") or 0
        words = _word_ids(config, section, BATCH_SIZE * (_DECODER_LENGTH - 1), generator)
        ids = torch.tensor(words).reshape(BATCH_SIZE, -1)
        inputs["decoder_input_ids"] = torch.cat([torch.full((BATCH_SIZE, 1), start), ids], dim=1)
    return inputs


def _sentence(config: Any, section: Any, size: int, placeholders: int, generator: torch.Generator) -> list[int]:
    """Ids of one sample: start token, image tokens, ``size`` minus start and end words, end token."""
    start, end = _token(section, "bos_token_id"), _token(section, "eos_token_id")
    first = [] if start is None else [start]
    last = [] if end is None else [end]
    image = [_image_token(config) or 0] * placeholders
    return first + image + _word_ids(config, section, size - len(first) - len(last), generator) + last


def _word_ids(config: Any, section: Any, count: int, generator: torch.Generator) -> list[int]:
    """Ids from the middle of the vocabulary (its ends hold reserved tokens) that are no special token."""
    vocabulary: int = section.vocab_size
    special = _special_ids(config)
    allowed = [i for i in range(vocabulary // 10, max(vocabulary - vocabulary // 10, 1)) if i not in special] or [0]
    picks = torch.randint(len(allowed), (count,), generator=generator).tolist()
    return [allowed[pick] for pick in picks]


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for section in _sections(config):
        for name, value in vars(section).items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                values = value if isinstance(value, (list, tuple)) else [value]
                found.update(item for item in values if isinstance(item, int))
    return found


def _image_token(config: Any) -> int | None:
    return next((value for name in _IMAGE_TOKEN if (value := _number(config, name)) is not None), None)


def _token(section: Any, *names: str) -> int | None:
    """The first of these special ids that the vocabulary holds."""
    vocabulary = getattr(section, "vocab_size", None)
    for name in names:
        value = getattr(section, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and value >= 0 and (vocabulary is None or value < vocabulary):
            return value
    return None


def _number(section: Any, *names: str) -> int | None:
    values = (getattr(section, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value >= 0), None)


def _text_section(config: Any) -> Any:
    """The config that the token ids belong to; None when there is no vocabulary."""
    try:
        section = config.get_text_config()
    except ValueError:  # several candidates
        section = None
    return section if hasattr(section, "vocab_size") else _section_with(config, "vocab_size")


def _decoder_section(config: Any) -> Any:
    decoder = getattr(config, "decoder", None)
    return decoder if hasattr(decoder, "vocab_size") else None


def _section_with(config: Any, name: str) -> Any:
    """The config, or the first one nested in it, that sets ``name``; None when there is none."""
    return next((section for section in _sections(config) if getattr(section, name, None) is not None), None)


def _sections(config: Any) -> Iterator[Any]:
    """A config and all configs nested in it, outermost first."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _sections(value)


def _required(model: nn.Module) -> str:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(model.forward).parameters.values()
    return ", ".join(item.name for item in parameters if item.default is item.empty and item.kind not in kinds)


def _describe(inputs: Inputs) -> str:
    return ", ".join(
        f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{name} {type(value).__name__}"
        for name, value in inputs.items()
    )
