"""Scenes drawn in another manner than those of pretraining: turned and faded pictures on striped grounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emoji_xvlm.scenes import GROUNDS, IMAGE_PX, KINDS, Scene, Split, compose_scene, load_atlas, sample_scenes

FloatArray = npt.NDArray[np.float32]

STRIPE_PERIODS_PX = (6, 16)
STRIPE_DEPTH = 0.15
"""Half the difference between two stripes, where the range of a colour is 1."""
FADING = 0.5
"""How far the colours of a picture move to their mean; the ground keeps its colour, which sentences name."""


@dataclass(frozen=True)
class SceneSet:
    """Scenes as a task sees them.

    Attributes:
        pixel_values: (N, 3, 64, 64) float32, -1 to 1.
        captions: (N) a true sentence each.
        sentences: (N) all true sentences of each.
    """

    pixel_values: FloatArray
    captions: tuple[str, ...]
    sentences: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.captions)


def domain_set(seed: int, count: int, split: Split, things: int) -> SceneSet:
    """The scenes of a seed that show a part of all things only, as a task of a narrow domain would.

    Args:
        seed: decides everything.
        count: how many.
        split: as in `scene_set`.
        things: how many different ones there are, spread over all that pretraining knows.
    """
    rng, atlas = np.random.default_rng(seed), load_atlas()
    known = np.linspace(0, len(atlas.names) - 1, things).round().astype(int)
    scenes: list[Scene] = []
    while len(scenes) < count:
        kinds = int(rng.choice(len(KINDS[split]), p=KINDS[split])) + 1
        chosen = rng.choice(known, size=kinds, replace=False)
        if bool(atlas.held_out_pairs[np.ix_(chosen, chosen)].any()) == (split == "test"):
            scenes.append(compose_scene(rng, atlas, [int(index) for index in chosen]))
    return _drawn(rng, scenes)


def scene_set(seed: int, count: int, split: Split, twins: float = 0.0) -> SceneSet:
    """The scenes of a seed.

    Args:
        seed: decides everything.
        count: how many.
        split: "train" shows pairs of things that met in pretraining, every "test" scene one that never did.
        twins: probability that a scene shows the same things as the one before it, in another layout.
    """
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, count, split, twins)
    return _drawn(rng, scenes)


def _drawn(rng: np.random.Generator, scenes: Sequence[Scene]) -> SceneSet:
    return SceneSet(draw(rng, scenes), tuple(scene.caption for scene in scenes), tuple(scene.sentences for scene in scenes))


def draw(rng: np.random.Generator, scenes: Sequence[Scene]) -> FloatArray:
    """Draw scenes in the other manner: (N, 3, 64, 64) float32, -1 to 1.

    Every picture is turned by a quarter, a half or three quarters and loses half of its colour; grounds have stripes of a
    random direction and width. Places and sizes are the scene's own, so that sentences stay true.
    """
    atlas = load_atlas()
    base = np.array([GROUNDS[scene.ground] for scene in scenes], dtype=np.float64)[:, None, None, :] / 255
    images = np.clip(base + _stripes(rng, len(scenes))[..., None], 0, 1).astype(np.float32)
    for image, scene in zip(images, scenes, strict=True):
        for item in scene.placements:
            picture = np.rot90(atlas.pictures[item.size][item.emoji], int(rng.integers(1, 4)))
            window = image[item.y : item.y + item.size, item.x : item.x + item.size]
            window *= 1 - picture[..., 3:]
            colours = picture[..., :3]
            window += (1 - FADING) * colours + FADING * colours.mean(axis=-1, keepdims=True)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2) * 2 - 1)


def _stripes(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """(N, 64, 64) waves of amplitude STRIPE_DEPTH."""
    angle = rng.uniform(0, np.pi, size=(count, 1, 1))
    period = rng.uniform(*STRIPE_PERIODS_PX, size=(count, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, size=(count, 1, 1))
    axis = np.arange(IMAGE_PX)
    along = np.cos(angle) * axis[None, :, None] + np.sin(angle) * axis[None, None, :]
    return np.asarray(STRIPE_DEPTH * np.sin(2 * np.pi * along / period + phase))
