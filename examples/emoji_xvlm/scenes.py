"""Composed scenes: one to four emoji on a coloured ground, with a sentence that says which, where and how many.

Everything is a function of integer seeds. Held-out means held-out: one pair of emoji in ten, chosen by a hash of the
two names, never meets in a training scene, and every test scene holds at least one such pair.
"""

import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

DATA = Path(__file__).resolve().parent / "data"

IMAGE_PX = 64
CELL_PX = 32
STEP_PX = 2  # positions and sizes are multiples of it
SIZES_PX = (24, 26, 28, 30)
MAX_OBJECTS = 4

GROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (200, 60, 60),
    "orange": (235, 150, 70),
    "yellow": (240, 225, 110),
    "green": (90, 170, 90),
    "blue": (80, 120, 210),
    "purple": (140, 90, 180),
    "pink": (245, 175, 200),
    "brown": (125, 85, 60),
    "gray": (140, 140, 140),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
COUNTS = ("one", "two", "three", "four")
CORNERS = (("top left", "top right"), ("bottom left", "bottom right"))
# {a} to {d} are noun phrases, {g} is the colour and {n} the colour with its article; every template of a layout is true
# of all its scenes.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "group": ("{a} on {n} ground", "{n} picture with {a}", "{a} , the ground is {g}"),
    "corner": ("{a} in the {corner} corner of {n} picture", "in the {corner} corner {a} , the ground is {g}"),
    "middle": ("{a} in the middle of {n} picture", "{a} in the middle , the ground is {g}"),
    "row": ("{a} side by side on {n} ground",),
    "column": ("{a} one above the other on {n} ground",),
    "horizontal": (
        "{a} left of {b} on {n} ground",
        "{b} right of {a} on {n} ground",
        "{a} on the left and {b} on the right of {n} picture",
        "on {n} ground {a} to the left of {b}",
    ),
    "vertical": (
        "{a} above {b} on {n} ground",
        "{b} below {a} on {n} ground",
        "{a} at the top and {b} at the bottom of {n} picture",
        "on {n} ground {b} under {a}",
    ),
    "two above one": (
        "{a} left of {b} , both above {c} , on {n} ground",
        "{c} below {a} and {b} on {n} ground",
        "{a} and {b} at the top and {c} at the bottom of {n} picture",
    ),
    "one above two": (
        "{c} above {a} and {b} on {n} ground",
        "{b} right of {a} , both below {c} , on {n} ground",
        "{c} at the top and {a} and {b} at the bottom of {n} picture",
    ),
    "four": (
        "{a} and {b} above {c} and {d} on {n} ground",
        "{a} left of {b} at the top and {c} left of {d} at the bottom of {n} picture",
        "on {n} ground {c} and {d} below {a} and {b}",
    ),
}
_FIXED_WORDS = {word for group in TEMPLATES.values() for text in group for word in text.split() if "{" not in word}
GRAMMAR_WORDS = sorted(_FIXED_WORDS | {*GROUNDS, *COUNTS, "a", "an", "top", "bottom", "left", "right", "corner"})

Split = Literal["train", "test"]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
# How many different emoji a scene holds: probabilities of 1, 2, 3 and 4.
KINDS: dict[Split, tuple[float, float, float, float]] = {"train": (0.1, 0.4, 0.3, 0.2), "test": (0.0, 0.5, 0.3, 0.2)}
HELD_OUT_IN_TEN = 1


@dataclass(frozen=True)
class Placement:
    """One drawn emoji: index into the atlas, left and top edge and size in pixels."""

    emoji: int
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """What is drawn, on which ground, the sentence, and all sentences that would have been true."""

    placements: tuple[Placement, ...]
    ground: str
    caption: str
    sentences: tuple[str, ...] = ()

    @property
    def emoji(self) -> tuple[int, ...]:
        """The different emoji of the scene, ascending."""
        return tuple(sorted({placement.emoji for placement in self.placements}))


@dataclass(frozen=True)
class Atlas:
    """Names and pictures of all emoji; ``pictures[size]`` is (N, size, size, 4) float32, premultiplied, 0 to 1."""

    names: tuple[str, ...]
    plurals: tuple[str, ...]
    pictures: dict[int, FloatArray]
    held_out_pairs: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as arrays.

    pixel_values: (B, 3, 64, 64) float32, -1 to 1.
    boxes: (B, 4, 4) int64, x0 y0 x1 y1 of each placement in pixels; zeros where there is none.
    labels: (B, 4) int64, emoji of each placement; -1 where there is none.
    sentences: of each scene, all that are true of it, the caption among them.
    """

    pixel_values: FloatArray
    captions: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]
    boxes: IntArray
    labels: IntArray


def _is_held_out(first: str, second: str) -> bool:
    key = "|".join(sorted((first, second)))
    return zlib.crc32(key.encode()) % 10 < HELD_OUT_IN_TEN


@functools.cache
def load_atlas(folder: Path = DATA) -> Atlas:
    """The committed atlas, drawn at every size that scenes use."""
    document = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    entries, side, columns = document["emoji"], document["sprite_px"], document["columns"]
    names = tuple(entry["name"] for entry in entries)
    pictures = {size: np.empty((len(names), size, size, 4), dtype=np.float32) for size in SIZES_PX}
    with Image.open(folder / "sprites.png") as file:
        atlas = file.convert("RGBA").convert("RGBa")  # premultiplied, so that resizing does not bleed
    for index in range(len(names)):
        left, top = index % columns * side, index // columns * side
        sprite = atlas.crop((left, top, left + side, top + side))
        for size in SIZES_PX:
            small = sprite.resize((size, size), Image.Resampling.LANCZOS)
            pictures[size][index] = np.asarray(small, dtype=np.float32) / 255
    held_out = np.array([[first != second and _is_held_out(first, second) for second in names] for first in names])
    return Atlas(names, tuple(entry["plural"] for entry in entries), pictures, held_out)


def _draw_emoji(rng: np.random.Generator, atlas: Atlas, kinds: int, split: Split) -> tuple[int, ...]:
    """``kinds`` different emoji whose pairs belong to the split."""
    while True:
        emoji = tuple(int(index) for index in rng.integers(len(atlas.names), size=kinds))
        if len(set(emoji)) < kinds:
            continue
        holds_new_pair = bool(atlas.held_out_pairs[np.ix_(emoji, emoji)].any())
        if holds_new_pair == (split == "test"):
            return emoji


def _with_article(name: str) -> str:
    begins_with_vowel = (name[0] in "aeiou" and not name.startswith("uni")) or name.startswith("x-")
    return f"{'an' if begins_with_vowel else 'a'} {name}"


def _phrase(atlas: Atlas, emoji: int, count: int) -> str:
    """Noun phrase such as "an owl" or "two owls"."""
    if count > 1:
        return f"{COUNTS[count - 1]} {atlas.plurals[emoji]}"
    return _with_article(atlas.names[emoji])


def _free(rng: np.random.Generator, room: int) -> int:
    """Offset from 0 to ``room`` in steps of STEP_PX."""
    return int(rng.integers(room // STEP_PX + 1)) * STEP_PX


def _in_cell(rng: np.random.Generator, emoji: int, row: int | None, column: int | None) -> Placement:
    """An emoji somewhere inside a cell; None leaves that axis free over the whole image."""
    size = int(rng.choice(SIZES_PX))
    x = _free(rng, IMAGE_PX - size) if column is None else column * CELL_PX + _free(rng, CELL_PX - size)
    y = _free(rng, IMAGE_PX - size) if row is None else row * CELL_PX + _free(rng, CELL_PX - size)
    return Placement(emoji, x, y, size)


def _compose_group(rng: np.random.Generator, atlas: Atlas, emoji: int) -> tuple[str, list[Placement], dict[str, str]]:
    """One to four copies of one emoji."""
    count = int(rng.integers(1, 5))
    slots = {"a": _phrase(atlas, emoji, count)}
    if count == 1 and rng.random() < 0.3:
        size = int(rng.choice(SIZES_PX))
        return "middle", [Placement(emoji, (IMAGE_PX - size) // 2, (IMAGE_PX - size) // 2, size)], slots
    cells = [divmod(int(cell), 2) for cell in rng.permutation(4)[:count]]
    placements = [_in_cell(rng, emoji, row, column) for row, column in cells]
    if count == 1:
        (row, column) = cells[0]
        return "corner", placements, {**slots, "corner": CORNERS[row][column]}
    if count == 2 and cells[0][0] == cells[1][0]:
        return "row", placements, slots
    if count == 2 and cells[0][1] == cells[1][1]:
        return "column", placements, slots
    return "group", placements, slots


def _compose_pair(rng: np.random.Generator, atlas: Atlas, emoji: Sequence[int]) -> tuple[str, list[Placement], dict[str, str]]:
    """Two emoji, one or two of each, side by side or one above the other."""
    is_horizontal = bool(rng.random() < 0.5)
    slots: dict[str, str] = {}
    placements: list[Placement] = []
    for side, (slot, index) in enumerate(zip("ab", emoji, strict=True)):
        count = int(rng.integers(1, 3))
        slots[slot] = _phrase(atlas, index, count)
        for other in (None,) if count == 1 else (0, 1):
            row, column = (other, side) if is_horizontal else (side, other)
            placements.append(_in_cell(rng, index, row, column))
    return "horizontal" if is_horizontal else "vertical", placements, slots


def _compose_many(rng: np.random.Generator, atlas: Atlas, emoji: Sequence[int]) -> tuple[str, list[Placement], dict[str, str]]:
    """Three emoji (two in one row, one in the other) or four (two rows of two)."""
    slots = {slot: _phrase(atlas, index, 1) for slot, index in zip("abcd", emoji, strict=False)}
    if len(emoji) == 4:
        return "four", [_in_cell(rng, index, *divmod(cell, 2)) for cell, index in enumerate(emoji)], slots
    pair_row = int(rng.integers(2))
    first, second, third = emoji
    placements = [
        _in_cell(rng, first, pair_row, 0),
        _in_cell(rng, second, pair_row, 1),
        _in_cell(rng, third, 1 - pair_row, None),
    ]
    return "two above one" if pair_row == 0 else "one above two", placements, slots


def compose_scene(rng: np.random.Generator, atlas: Atlas, emoji: Sequence[int]) -> Scene:
    """Lay out the given emoji (one to four different ones) and say what the picture shows."""
    if len(emoji) == 1:
        kind, placements, slots = _compose_group(rng, atlas, emoji[0])
    elif len(emoji) == 2:
        kind, placements, slots = _compose_pair(rng, atlas, emoji)
    else:
        kind, placements, slots = _compose_many(rng, atlas, emoji)
    ground = str(rng.choice(list(GROUNDS)))
    sentences = tuple(template.format(g=ground, n=_with_article(ground), **slots) for template in TEMPLATES[kind])
    return Scene(tuple(placements), ground, sentences[int(rng.choice(len(sentences)))], sentences)


def sample_scenes(rng: np.random.Generator, count: int, split: Split, twins: float = 0.0) -> list[Scene]:
    """Draw scenes.

    Args:
        rng: decides everything.
        count: how many.
        split: "train" never shows a held-out pair, every "test" scene does.
        twins: probability that a scene reuses the emoji of the one before it, in another order and layout, which makes
            the pair a hard negative of each other.
    """
    atlas = load_atlas()
    scenes: list[Scene] = []
    previous: tuple[int, ...] = ()
    for _ in range(count):
        if len(previous) > 1 and rng.random() < twins:
            emoji = tuple(int(index) for index in rng.permutation(previous))
            previous = ()
        else:
            emoji = _draw_emoji(rng, atlas, int(rng.choice(4, p=KINDS[split])) + 1, split)
            previous = emoji
        scenes.append(compose_scene(rng, atlas, emoji))
    return scenes


def render_scenes(rng: np.random.Generator, scenes: Sequence[Scene], augment: bool = False) -> SceneBatch:
    """Draw scenes as arrays.

    The ground has a random tint and slope. ``augment`` adds contrast, brightness and noise; nothing is ever flipped,
    because the sentences say left and right.
    """
    atlas = load_atlas()
    count = len(scenes)
    tint = rng.normal(0, 0.03, size=(count, 1, 1, 3))
    slope = rng.normal(0, 0.03, size=(count, 2, 1, 1, 1))
    axis = np.linspace(-1, 1, IMAGE_PX)
    base = np.array([GROUNDS[scene.ground] for scene in scenes])[:, None, None, :] / 255
    shading = slope[:, 0] * axis[None, :, None, None] + slope[:, 1] * axis[None, None, :, None]
    images = np.clip(base + tint + shading, 0, 1).astype(np.float32)

    boxes = np.zeros((count, MAX_OBJECTS, 4), dtype=np.int64)
    labels = np.full((count, MAX_OBJECTS), -1, dtype=np.int64)
    for index, scene in enumerate(scenes):
        for slot, item in enumerate(scene.placements):
            picture = atlas.pictures[item.size][item.emoji]
            window = images[index, item.y : item.y + item.size, item.x : item.x + item.size]
            window *= 1 - picture[..., 3:]
            window += picture[..., :3]
            boxes[index, slot] = item.x, item.y, item.x + item.size, item.y + item.size
            labels[index, slot] = item.emoji

    images = images.transpose(0, 3, 1, 2) * 2 - 1
    if augment:
        contrast = rng.uniform(0.8, 1.2, size=(count, 1, 1, 1))
        brightness = rng.normal(0, 0.05, size=(count, 3, 1, 1))
        noise = rng.standard_normal(images.shape, dtype=np.float32) * np.float32(0.03)
        images = np.clip(images * contrast + brightness + noise, -1, 1)
    pixel_values = np.ascontiguousarray(images, dtype=np.float32)
    captions = tuple(scene.caption for scene in scenes)
    return SceneBatch(pixel_values, captions, tuple(scene.sentences for scene in scenes), boxes, labels)


def training_batch(seed: int, step: int, batch_size: int) -> SceneBatch:
    """Batch number ``step`` of the endless training stream."""
    rng = np.random.default_rng([seed, step])
    return render_scenes(rng, sample_scenes(rng, batch_size, "train", twins=0.2), augment=True)


def held_out_batch(count: int, seed: int = 7_000_001) -> SceneBatch:
    """The first ``count`` test scenes."""
    rng = np.random.default_rng([seed, 0])
    return render_scenes(rng, sample_scenes(rng, count, "test"))


def calibration_batch(index: int, batch_size: int, seed: int = 8_000_001) -> SceneBatch:
    """Batch number ``index`` of the calibration set: training pairs, but scenes that training did not draw."""
    rng = np.random.default_rng([seed, index])
    return render_scenes(rng, sample_scenes(rng, batch_size, "train"))
