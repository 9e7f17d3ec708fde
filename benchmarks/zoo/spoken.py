"""Inputs of models that take recordings: frames of a spectrogram or a waveform, and places for them in the text."""

from __future__ import annotations

from benchmarks.zoo.row import Values

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
