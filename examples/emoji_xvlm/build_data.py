"""Render the emoji atlas, its names and the vocabulary from two Debian packages.

Nobody needs this script to run the example: what it writes is committed under ``data/``. To rebuild::

    apt-get install fonts-noto-color-emoji unicode-cldr-core && cd examples && python -m emoji_xvlm.build_data

It reads ``data/selection.txt`` (which emoji) and writes ``data/sprites.png`` (the atlas), ``data/names.json`` and
``vocab.json``.
"""

import argparse
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from emoji_xvlm.scenes import GRAMMAR_WORDS
from emoji_xvlm.tokenizer import SPECIAL_TOKENS

HERE = Path(__file__).resolve().parent
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")

STRIKE_PX = 109  # the one bitmap size inside the font
SPRITE_PX = 48  # what the atlas stores; scenes draw it smaller
COLUMNS = 24

IRREGULAR_PLURALS = {"mouse": "mice", "leaf": "leaves", "foot": "feet", "tooth": "teeth", "ox": "oxen", "fly": "flies"}


def pluralise(name: str) -> str:
    """Plural of a name, by its last word ("maple leaf" gives "maple leaves")."""
    head, _, last = name.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        plural = IRREGULAR_PLURALS[last]
    elif re.search(r"[^aeiou]y$", last):
        plural = last[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", last):
        plural = last + "es"
    else:
        plural = last + "s"
    return f"{head} {plural}".strip()


def read_selection(path: Path) -> list[str]:
    """Names wanted, in file order, without comments and repetitions."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    names = [name.strip() for line in lines for name in line.split(",")]
    return list(dict.fromkeys(name for name in names if name))


def read_short_names(path: Path) -> dict[str, str]:
    """Emoji character by CLDR short name; single code points only, so no flags, keycaps or skin tones."""
    entries = ET.parse(path).getroot().iter("annotation")
    named = [(entry.text or "", entry.attrib["cp"]) for entry in entries if entry.get("type") == "tts"]
    return {name: cp for name, cp in named if len(cp) == 1}


def render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cropped to a square around its ink, (SPRITE_PX, SPRITE_PX) RGBA."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font has no picture of U+{ord(character):04X}")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(canvas.crop(box), ((side - right + left) // 2, (side - bottom + top) // 2))
    small = square.convert("RGBa").resize((SPRITE_PX, SPRITE_PX), Image.Resampling.LANCZOS).convert("RGBA")
    # Colour under a fully transparent pixel is noise that only costs bytes.
    opaque = small.getchannel("A").point(lambda alpha: 255 if alpha else 0)
    blank = Image.new("RGBA", small.size, (0, 0, 0, 0))
    return Image.composite(small, blank, ImageChops.lighter(opaque, opaque))


def build_atlas(sprites: Sequence[Image.Image]) -> Image.Image:
    """Sprites in row-major order, COLUMNS to a row."""
    rows = -(-len(sprites) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_PX, rows * SPRITE_PX), (0, 0, 0, 0))
    for index, sprite in enumerate(sprites):
        atlas.paste(sprite, (index % COLUMNS * SPRITE_PX, index // COLUMNS * SPRITE_PX))
    return atlas


def build_vocabulary(entries: Sequence[dict[str, str]]) -> list[str]:
    """Special tokens, plural endings, the words of the sentences and the words of the names, in this order.

    A plural that the endings do not spell ("mice") is a word of its own.
    """
    words = {word for entry in entries for word in entry["name"].split()}
    for entry in entries:
        singular, plural = entry["name"].split()[-1], entry["plural"].split()[-1]
        if plural not in (singular + "s", singular + "es"):
            words.add(plural)
    return [*SPECIAL_TOKENS, "##s", "##es", *GRAMMAR_WORDS, *sorted(words - set(GRAMMAR_WORDS))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--annotations", type=Path, default=ANNOTATIONS)
    arguments = parser.parse_args()

    characters = read_short_names(arguments.annotations)
    selection = read_selection(HERE / "data" / "selection.txt")
    unknown = [name for name in selection if name not in characters]
    if unknown:
        raise SystemExit(f"not a CLDR short name of a single code point: {', '.join(unknown)}")

    font = ImageFont.truetype(str(arguments.font), STRIKE_PX)
    sprites = [render(characters[name], font) for name in selection]
    entries = [{"emoji": characters[name], "name": name.lower(), "plural": pluralise(name.lower())} for name in selection]

    build_atlas(sprites).save(HERE / "data" / "sprites.png", optimize=True)
    document = {"sprite_px": SPRITE_PX, "columns": COLUMNS, "emoji": entries}
    (HERE / "data" / "names.json").write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    vocabulary = build_vocabulary(entries)
    (HERE / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(f"{len(entries)} emoji, {len(vocabulary)} tokens")


if __name__ == "__main__":
    main()
