"""Masks carried to another model: by name, by prefix, by what the user says; and what did not match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn

import mfcompile
from mfcompile.masks import MaskSet, PackedMask


def stack(layers: int = 2, width: int = 4) -> nn.ModuleList:
    return nn.ModuleList([nn.ModuleDict({"up": nn.Linear(width, 8), "down": nn.Linear(8, width)}) for _ in range(layers)])


def tree(**parts: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(parts)


def masks_for(module: nn.Module, prefix: str = "") -> MaskSet:
    """A mask of its own for every matrix."""
    generator = torch.Generator().manual_seed(0)
    packed = {
        prefix + name: PackedMask.pack(torch.rand(parameter.shape, generator=generator) > 0.5)
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1
    }
    return MaskSet(packed, dict.fromkeys(packed, "text"), fingerprint="x", sparsity=0.5)


def assert_matched(result: mfcompile.MaskTransfer, masks: MaskSet, expected: Mapping[str, str]) -> None:
    assert result.matched == expected
    assert set(result.masks) == set(expected)
    for target, source in expected.items():
        assert torch.equal(result.masks[target], masks[source])
        assert result.masks.regions[target] == "text"


def test_equal_names_take_their_masks_and_the_rest_is_said() -> None:
    masks = masks_for(tree(vision=stack(), text=stack(), head=nn.Linear(4, 2)))
    captioner = tree(vision=stack(), text=stack(), head=nn.Linear(4, 9), decoder=nn.Linear(4, 4))
    result = mfcompile.transfer_masks(masks, captioner)
    trunk = [name for name in masks if name != "head.weight"]
    assert_matched(result, masks, dict(zip(trunk, trunk, strict=True)))
    assert result.unmatched == {"head.weight": "head.weight is (9, 4), the mask (2, 4)"}
    assert result.dense == ("head.weight", "decoder.weight")
    assert result.masks.fingerprint == ""
    assert str(result).splitlines() == [
        "8 weights got masks, 1 masks went nowhere, 2 matrices stay dense",
        "no place for head.weight: head.weight is (9, 4), the mask (2, 4)",
    ]
    mfcompile.verify_masks(mfcompile.mask_module(captioner, result.masks))
    with pytest.raises(mfcompile.InputError, match=r"1 of 9 masks have no place in ModuleDict \(head\.weight: .*names="):
        mfcompile.transfer_masks(masks, captioner, strict=True)


def test_prefixes_are_added_and_removed() -> None:
    masks = masks_for(tree(vision=stack(), text=stack()))
    wrapped = tree(clip=tree(vision=stack(), text=stack()), head=nn.Linear(4, 2))
    result = mfcompile.transfer_masks(masks, wrapped, strict=True)
    assert_matched(result, masks, {f"clip.{name}": name for name in masks})
    back = mfcompile.transfer_masks(result.masks, tree(vision=stack(), text=stack()), strict=True)
    assert back.masks == masks


def test_a_prefix_is_replaced_where_one_stack_fits() -> None:
    masks = masks_for(tree(text_encoder=tree(encoder=tree(layer=stack())), vision=stack(3)))
    captioner = tree(text_decoder=tree(bert=tree(encoder=tree(layer=stack()))), vision=stack(3))
    result = mfcompile.transfer_masks(masks, captioner, strict=True)
    sources = {name: name.replace("text_decoder.bert", "text_encoder") for name in result.matched}
    assert_matched(result, masks, sources)
    assert len(result.matched) == 10


def test_stacks_of_other_depths_and_stacks_that_fit_alike_are_left() -> None:
    masks = masks_for(tree(encoder=tree(layer=stack(3))))
    shallow = mfcompile.transfer_masks(masks, tree(decoder=tree(layer=stack(2))))
    assert set(shallow.unmatched) == {"encoder.layer.2.up.weight", "encoder.layer.2.down.weight"}
    assert set(shallow.unmatched.values()) == {"no weight of its shape has a name that ends alike"}
    two = mfcompile.transfer_masks(masks, tree(a=tree(layer=stack(3)), b=tree(layer=stack(3))))
    assert not two.matched
    assert two.unmatched["encoder.layer.0.up.weight"] == (
        "a.layer.0.up.weight, b.layer.0.up.weight fit alike: say which with names"
    )
    both = masks_for(tree(a=tree(layer=stack()), b=tree(layer=stack())))
    one = mfcompile.transfer_masks(both, tree(layer=stack()))
    assert not one.matched
    rival = one.unmatched["a.layer.0.up.weight"]
    assert rival == "layer.0.up.weight fits b.layer.0.up.weight as well: say which goes there with names"


def test_a_stage_of_another_number_is_another_stage() -> None:
    stages = masks_for(tree(a=tree(stages=nn.ModuleList([tree(blocks=stack(1)), tree(blocks=stack(1))]))))
    second = MaskSet({name: packed for name, packed in stages.packed.items() if ".stages.1." in name})
    assert not mfcompile.transfer_masks(second, tree(b=tree(stages=nn.ModuleList([tree(blocks=stack(1))])))).matched


def test_masks_that_are_sent_nowhere_do_not_leave_their_place_to_others() -> None:
    masks = masks_for(tree(text=tree(layers=stack()), image=tree(layers=stack())))
    other = tree(tower=tree(trunk=tree(layers=stack())))
    assert not mfcompile.transfer_masks(masks, other).matched  # both fit
    sent = (
        r"'image' sends image\.layers\.0\.up\.weight to tower\.layers\.0\.up\.weight, .* Nearest names: tower\.trunk\.layers\.0"
    )
    with pytest.raises(mfcompile.InputError, match=sent):
        mfcompile.transfer_masks(masks, other, {"image": "tower"})
    result = mfcompile.transfer_masks(masks, other, {"image": "tower.trunk"})
    assert set(result.matched.values()) == {name for name in masks if name.startswith("image")}
    assert str(result).splitlines()[1] == "4 from image to tower.trunk"
    deep = masks_for(tree(text=stack(3)))
    shallow = mfcompile.transfer_masks(deep, tree(decoder=stack(2)), {"text": "decoder"})
    assert shallow.unmatched["text.2.up.weight"] == "the model has no weight called decoder.2.up.weight"
    assert len(shallow.matched) == 4


def test_the_user_says_where_masks_go() -> None:
    masks = masks_for(tree(text=stack(), vision=stack()))
    target = tree(encoder=stack(), decoder=stack(), vision=stack())
    to_both = mfcompile.transfer_masks(masks, target, {"text": ["encoder", "decoder"]}, strict=True)
    expected = {name: name for name in masks if name.startswith("vision")}
    for part in ("encoder", "decoder"):
        expected |= {name.replace("text", part): name for name in masks if name.startswith("text")}
    assert_matched(to_both, masks, expected)
    some = mfcompile.transfer_masks(masks, target, {"text.[1]": "decoder.*"} | {"re:text\\.0\\.(.*)": "encoder.1.\\1"})
    assert some.matched["encoder.1.up.weight"] == "text.0.up.weight"
    assert some.matched["decoder.1.up.weight"] == "text.1.up.weight"
    assert "decoder.0.up.weight" not in some.matched
    swapped = mfcompile.transfer_masks(masks, target, {"text.?.*.weight": "decoder.?.*.weight"})
    assert swapped.matched["decoder.1.down.weight"] == "text.1.down.weight"


def test_tied_weights_take_one_mask() -> None:
    target = tree(encoder=stack(), decoder=stack())
    for index in range(2):
        target.decoder[index].up.weight = target.encoder[index].up.weight  # type: ignore[index,union-attr]
    masks = masks_for(tree(encoder=stack(), other=stack()))
    result = mfcompile.transfer_masks(masks, target, {"other": "decoder"})
    assert "decoder.0.up.weight" not in result.masks
    other = result.unmatched["encoder.0.up.weight"]
    assert other == "encoder.0.up.weight has the mask of other.0.up.weight already, which is another one"
    own = replace(masks, packed={name: packed for name, packed in masks.packed.items() if name.startswith("encoder")})
    alike = mfcompile.transfer_masks(own, target, {"encoder": ["encoder", "decoder"]}, strict=True)
    masked = mfcompile.mask_module(target, alike.masks)
    assert mfcompile.masks_of(masked) == alike.masks


def test_new_values_go_with_their_masks() -> None:
    masks = masks_for(tree(text=stack()))
    values = {name: torch.full((packed.kept_count,), 2.0) for name, packed in masks.packed.items()}
    result = mfcompile.transfer_masks(replace(masks, new_values=values), tree(clip=tree(text=stack())), strict=True)
    module = mfcompile.mask_module(tree(clip=tree(text=stack())), result.masks)
    assert set(mfcompile.strip(module).get_parameter("clip.text.0.up.weight").detach().flatten().tolist()) == {0.0, 2.0}


def test_a_masked_and_a_wrapped_model_take_masks_by_their_plain_names() -> None:
    masks = masks_for(tree(text=stack()))
    masked = mfcompile.mask_module(tree(text=stack()), masks)
    assert not mfcompile.transfer_masks(masks, nn.DataParallel(masked), strict=True).unmatched


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"txt": "text"}, r"the pattern 'txt' matches no mask; the masks are of text\.0\.up\.weight"),
        ({"text.*": "text"}, "'text.*' has 1 wildcards and 'text' 0"),
        ({"re:(": "text"}, "is not a valid regular expression"),
        ({"re:text.*": "\\2"}, "does not fit the pattern"),
    ],
)
def test_patterns_that_cannot_be_used_are_refused(names: dict[str, str], message: str) -> None:
    with pytest.raises(mfcompile.InputError, match=message):
        mfcompile.transfer_masks(masks_for(tree(text=stack())), tree(text=stack()), names)
