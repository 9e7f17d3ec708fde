"""Inputs of models that take recordings: frames of a spectrogram or a waveform, and places for them in the text."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.zoo.packed import placed_text
from benchmarks.zoo.row import Noise, Spec, Values

AUDIO, AUDIO_START, AUDIO_END = 8, 9, 10
"""Tokens: a place for a recording's feature, before a recording, after it."""

FRAMES = (32, 24)
"""Frames of two recordings; the shorter is padded."""


def audio_run(places: int) -> list[int]:
    """The tokens of a recording: a start, its places, an end."""
    return [AUDIO_START, *[AUDIO] * places, AUDIO_END]


def frames_mask(lengths: tuple[int, ...] = FRAMES, dtype: str = "int64") -> Values:
    """1 for a recording's frames, 0 for padding, (recordings, longest)."""
    return Values([[1] * length + [0] * (max(lengths) - length) for length in lengths], dtype)


def spoken(
    places: Sequence[int],
    features: int,
    *,
    frames: tuple[int, ...] = FRAMES,
    mask: str | None = "input_features_mask",
    frames_last: bool = True,
) -> dict[str, Spec]:
    """Text with a run of audio tokens in each sample, and the spectrograms of the recordings.

    Args:
        places: of each recording among its sample's tokens.
        features: numbers of a frame.
        frames: of each recording; the shorter are padded.
        mask: name of the mask of frames, if the model takes one.
        frames_last: spectrograms are (features, frames), not (frames, features).
    """
    found = placed_text([[audio_run(count)] for count in places])
    shape = (features, max(frames)) if frames_last else (max(frames), features)
    found["input_features"] = Noise((len(frames), *shape))
    if mask is not None:
        found[mask] = frames_mask(frames)
    return found
