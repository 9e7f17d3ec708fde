"""Mask sets: packed bits, digests, and files that are refused when anything about them is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from mfcompile.errors import InputError
from mfcompile.masks import MaskSet, PackedMask, fingerprint
from tests.models import TwoLayers, tiny_vlm


def masks(seed: int = 0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    packed = {
        name: PackedMask.pack(torch.rand(shape, generator=generator) > 0.5)
        for name, shape in {"b": (3, 5), "a": (8, 2)}.items()
    }
    return MaskSet(packed, {"b": "vision", "a": "text"}, "f" * 64, 0.63)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_packing_keeps_every_bit(shape: list[int], data: st.DataObject) -> None:
    count = int(np.prod(shape))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(shape)
    packed = PackedMask.pack(mask)
    assert torch.equal(packed.unpack(), mask)
    assert (packed.kept_count, packed.weight_count) == (int(mask.sum()), count)
    assert packed.bits.size == (count + 7) // 8


def test_a_view_is_packed_as_it_reads() -> None:
    mask = torch.tensor([[True, False, False], [True, True, False]])
    assert torch.equal(PackedMask.pack(mask.t()).unpack(), mask.t())


def test_a_set_is_a_mapping_in_order_with_counts() -> None:
    found = masks()
    assert list(found) == ["b", "a"]
    assert len(found) == 2
    assert found.weight_count == 31
    assert found.kept_count == sum(int(mask.sum()) for mask in found.values())
    with pytest.raises(KeyError):
        found["c"]


def test_the_digest_speaks_of_names_shapes_and_bits_and_of_nothing_else() -> None:
    one = masks()
    same = MaskSet(dict(sorted(one.packed.items())), {}, "", None)
    assert same.digest() == one.digest()
    renamed = MaskSet({"c": one.packed["b"], "a": one.packed["a"]})
    reshaped = MaskSet({**one.packed, "b": PackedMask(one.packed["b"].bits, (5, 3))})
    flipped = MaskSet({**one.packed, "b": PackedMask.pack(~one["b"])})
    assert len({one.digest(), renamed.digest(), reshaped.digest(), flipped.digest()}) == 4


def test_sets_are_equal_when_their_masks_are() -> None:
    assert masks() == MaskSet(masks().packed)
    assert hash(masks()) == hash(MaskSet(masks().packed))
    assert masks() != masks(1)
    assert masks() != {"b": masks()["b"]}


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = masks().save(tmp_path / "folder" / "masks.safetensors")
    found = MaskSet.load(str(path))
    assert found == masks()
    assert list(found) == ["b", "a"]
    assert (dict(found.regions), found.fingerprint, found.sparsity) == ({"b": "vision", "a": "text"}, "f" * 64, 0.63)


def test_an_unknown_sparsity_and_no_masks_at_all_can_be_saved(tmp_path: Path) -> None:
    assert MaskSet.load(MaskSet(masks().packed).save(tmp_path / "one")).sparsity is None
    assert len(MaskSet.load(MaskSet({}).save(tmp_path / "two"))) == 0


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no masks file at .*none\.safetensors"):
        MaskSet.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("content", [b"", b"pickle", b"\x80\x02}q\x00."])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "masks").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as a masks file .*: it is damaged or truncated"):
        MaskSet.load(tmp_path / "masks")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = masks().save(tmp_path / "masks").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(InputError, match=r"cut (cannot be read as a masks file|.*damaged)"):
            MaskSet.load(tmp_path / "cut")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    data = bytearray(masks().save(tmp_path / "masks").read_bytes())
    data[-1] ^= 0b0100_0000
    (tmp_path / "masks").write_bytes(data)
    with pytest.raises(InputError, match=r"the masks do not match their sha256; the file is damaged\. Prune again"):
        MaskSet.load(tmp_path / "masks")


def rewritten(tmp_path: Path, **changes: str) -> Path:
    """A masks file with other metadata."""
    path = masks().save(tmp_path / "masks")
    shapes = json.dumps({"b": [3, 5], "a": [8, 2]})
    metadata = {"format": "mfcompile.masks", "format_version": "1", "sha256": masks().digest(), "shapes": shapes}
    save_file(load_file(path), path, metadata={**metadata, **changes})
    return path


def test_metadata_by_hand_is_read(tmp_path: Path) -> None:
    assert MaskSet.load(rewritten(tmp_path)) == masks()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is a safetensors file, but not of masks"),
        ({"format_version": "9"}, r"is of mask format 9; this version reads 1, 2 and 3\. Write it again"),
        ({"sha256": "0" * 64}, "do not match their sha256"),
        ({"shapes": '{"b": [4, 5], "a": [8, 2]}'}, "the mask of b does not hold 20 bits"),
        ({"shapes": '{"b": [3, 5], "c": [8, 2]}'}, "cannot be read as a masks file"),
        ({"shapes": "[1, 2]"}, "cannot be read as a masks file"),
        ({"shapes": '{"b": 15, "a": [8, 2]}'}, "cannot be read as a masks file"),
        ({"shapes": "{"}, "cannot be read as a masks file"),
        ({"regions": "[7]"}, "cannot be read as a masks file"),
        ({"sparsity": "much"}, "cannot be read as a masks file"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskSet.load(rewritten(tmp_path, **changes))


def test_a_file_without_metadata_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.uint8)}, tmp_path / "masks")
    with pytest.raises(InputError, match="not of masks: its metadata names no mfcompile format"):
        MaskSet.load(tmp_path / "masks")


def test_a_fingerprint_changes_with_every_value_name_shape_and_dtype() -> None:
    def changed(change: str) -> nn.Module:
        model = TwoLayers()
        model.register_buffer("state", torch.zeros(2, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
            if change == "value":
                model.get_parameter("blocks.1.down.bias")[0] = 0.5
        if change == "buffer":
            model.get_buffer("state")[1, 2] = 1.0
        if change == "name":
            model.renamed = model.blocks
            del model.blocks
        if change == "shape":
            model.register_buffer("state", torch.zeros(3, 2))
        return model.to(torch.bfloat16) if change == "dtype" else model

    assert fingerprint(changed("")) == fingerprint(changed(""))
    kinds = ["", "value", "buffer", "name", "shape", "dtype"]
    assert len({fingerprint(changed(kind)) for kind in kinds}) == len(kinds)
    assert fingerprint(tiny_vlm()) == fingerprint(tiny_vlm())
