"""Example inputs in all the forms that users have, and what does not fit."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mfcompile.errors import InputError
from mfcompile.inputs import ExampleInputs, as_function, normalize_inputs, output_tensors, slice_batch

ONE, TWO = torch.ones(2, 3), torch.zeros(2, 4)


class Pair(nn.Module):
    def forward(self, image: Tensor, text: Tensor | None = None, *, flag: bool = True) -> Tensor:
        return image


class OneArgument(nn.Module):
    def forward(self, batch: Any) -> Tensor:
        result: Tensor = batch["image"]
        return result


class Variadic(nn.Module):
    def forward(self, first: Tensor, *others: Tensor, **named: Tensor) -> Tensor:
        return first


class Named(NamedTuple):
    logits: Tensor
    hidden: tuple[Tensor, ...]


class BatchEncoding(UserDict[str, Any]):
    """As a tokenizer gives it."""


def normalized(model: nn.Module, inputs: Any) -> ExampleInputs:
    return normalize_inputs(model, inputs)


@pytest.mark.parametrize("kind", [dict, OrderedDict, BatchEncoding])
def test_a_mapping_is_keyword_arguments(kind: type) -> None:
    found = normalized(Pair(), kind({"text": TWO, "image": ONE, "flag": False}))
    assert found.args == ()
    assert found.kwargs == {"text": TWO, "image": ONE, "flag": False}
    assert type(found.kwargs) is dict
    assert list(found.tensors()) == list(found) == ["text", "image"]
    assert found.tensors()["text"] is TWO


@pytest.mark.parametrize("inputs", [(ONE, TWO), [ONE, TWO]])
def test_a_sequence_is_positional_and_takes_the_names_of_forward(inputs: Any) -> None:
    found = normalized(Pair(), inputs)
    assert (found.args, found.kwargs, found.names) == ((ONE, TWO), {}, ("image", "text"))


def test_a_tensor_is_the_first_argument() -> None:
    assert normalized(Pair(), ONE).tensors() == {"image": ONE}


def test_what_is_normalized_already_comes_back() -> None:
    found = normalized(Pair(), ONE)
    assert normalized(Pair(), found) is found


def test_none_is_passed_on_and_is_no_input() -> None:
    found = normalized(Pair(), {"image": ONE, "text": None})
    assert found.kwargs == {"image": ONE, "text": None}
    assert found.names == ("image",)
    assert normalized(Pair(), (ONE, None)).names == ("image",)


@pytest.mark.parametrize("kind", [dict, BatchEncoding])
def test_a_mapping_goes_whole_to_a_forward_of_one_argument(kind: type) -> None:
    found = normalized(OneArgument(), kind({"image": ONE, "nested": {"a": [TWO, None]}}))
    assert len(found.args) == 1
    assert found.kwargs == {}
    assert found.names == ("batch.image", "batch.nested.a.0")
    assert type(found.args[0]) is dict


class Flagged(nn.Module):
    def forward(self, batch: Any, train: bool = False, **more: Any) -> Tensor:
        result: Tensor = batch["image"]
        return result


def test_flags_beside_the_one_argument_do_not_matter() -> None:
    assert normalized(Flagged(), {"image": ONE}).names == ("batch.image",)
    assert normalized(Flagged(), {"batch": {"image": ONE}}).names == ("batch.image",)
    assert normalized(Flagged(), ({"image": ONE}, True)).names == ("batch.image",)


def test_a_mapping_with_the_name_of_the_one_argument_is_keywords() -> None:
    assert normalized(OneArgument(), {"batch": {"image": ONE}}).names == ("batch.image",)
    with pytest.raises(InputError, match="got an unexpected keyword argument 'other'"):
        normalized(OneArgument(), {"batch": ONE, "other": TWO})


def test_variadic_arguments_get_names_of_their_own() -> None:
    assert normalized(Variadic(), (ONE, TWO, TWO)).names == ("first", "others_1", "others_2")
    assert normalized(Variadic(), {"first": ONE, "mask": TWO}).names == ("first", "mask")


def test_nested_mappings_become_dicts() -> None:
    found = normalized(Pair(), {"image": ONE, "text": BatchEncoding({"ids": (TWO,)})})
    assert found.kwargs["text"] == {"ids": (TWO,)}
    assert found.names == ("image", "text.ids.0")


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"imag": ONE}, "missing a required argument: 'image'"),
        ({"image": ONE, "mask": TWO}, "got an unexpected keyword argument 'mask'"),
        ((ONE, TWO, TWO), "too many positional arguments"),
        ((), "missing a required argument: 'image'"),
    ],
)
def test_inputs_that_do_not_fit_show_the_signature(inputs: Any, problem: str) -> None:
    with pytest.raises(InputError) as caught:
        normalize_inputs(Pair(), inputs, what="calibration batch 3")
    assert str(caught.value).startswith("calibration batch 3 does not fit Pair.forward(image: ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith("Pass a dict whose keys are parameters of forward, or a tuple in their order")


@pytest.mark.parametrize("inputs", [3, "text", None, object()])
def test_other_kinds_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match=f"example_inputs is a {type(inputs).__name__}: give a tensor, a tuple of tensors"):
        normalized(Pair(), inputs)


@pytest.mark.parametrize("inputs", [{"image": 3}, (None,)])
def test_inputs_without_a_tensor_are_refused(inputs: Any) -> None:
    with pytest.raises(InputError, match="example_inputs holds no tensor: Pair needs at least one tensor input"):
        normalized(Pair(), inputs)


def test_an_input_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="holds no tensor"):
        normalized(Pair(), (None,))


def test_named_tuples_stay_what_they_are() -> None:
    found = normalized(Pair(), {"image": ONE, "text": Named(ONE, (TWO,))})
    assert type(found.kwargs["text"]) is Named
    assert found.names == ("image", "text.logits", "text.hidden.0")


def test_mapping_tensors_keeps_structure_names_and_everything_else() -> None:
    found = normalized(OneArgument(), {"image": ONE, "size": 3, "more": [TWO, None]})
    seen: list[str] = []

    def change(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return tensor + 1

    changed = found.map_tensors(change)
    assert seen == list(found.names) == list(changed.names)
    assert torch.equal(changed.tensors()["batch.more.0"], TWO + 1)
    assert changed.args[0]["size"] == 3
    assert changed.args[0]["more"][1] is None
    assert found.tensors()["batch.image"] is ONE


def test_call_passes_both_kinds_of_arguments() -> None:
    assert normalized(Pair(), (ONE, TWO)).call(lambda *args, **kwargs: (args, kwargs)) == ((ONE, TWO), {})
    assert normalized(Pair(), {"image": ONE}).call(lambda *args, **kwargs: (args, kwargs)) == ((), {"image": ONE})


@pytest.mark.parametrize(
    ("tensors", "size"),
    [([ONE, TWO], 2), ([ONE, torch.tensor(3.0)], 2), ([ONE, torch.ones(3)], None), ([torch.tensor(1.0)], None)],
)
def test_batch_size_is_what_all_agree_on(tensors: list[Tensor], size: int | None) -> None:
    assert normalized(Variadic(), tensors).batch_size() == size


def test_slicing_a_batch() -> None:
    found = slice_batch(normalized(Variadic(), (torch.arange(6).reshape(3, 2), torch.tensor(7))), [2, 0, 2])
    assert found.tensors()["first"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert found.tensors()["others_1"] == 7
    with pytest.raises(InputError, match="the inputs share no batch dimension"):
        slice_batch(normalized(Variadic(), (ONE, torch.ones(3))), [0])


@dataclass
class Output:
    loss: Tensor
    extra: dict[str, Tensor] | None = None


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (ONE, ["output_0"]),
        ((ONE, None, TWO), ["output_0", "output_2"]),
        ([ONE, (TWO, ONE)], ["output_0", "output_1_0", "output_1_1"]),
        ({"logits": ONE, "hidden": (TWO, ONE), "none": None}, ["logits", "hidden.0", "hidden.1"]),
        (Named(ONE, (TWO,)), ["logits", "hidden.0"]),
        (Output(ONE, {"a": TWO}), ["loss", "extra.a"]),
        (({"logits": ONE},), ["output_0_logits"]),
        (None, []),
        ("text", []),
    ],
)
def test_names_of_outputs(output: Any, names: list[str]) -> None:
    assert list(output_tensors(output)) == names


def test_batches_are_given_from_the_start_every_time() -> None:
    batches = [{"image": torch.ones(2, 3)} for _ in range(4)]
    for given in (batches, iter(batches), lambda: iter(batches)):
        make = as_function(given)
        assert [len(list(make())) for _ in range(2)] == [4, 4]


def test_batches_end_with_the_one_that_reaches_the_number_of_samples() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield UserDict({"flag": True, "image": torch.ones(2, 3)})

    for given in (endless(), endless):
        make = as_function(given, num_samples=5)
        assert [len(list(make())) for _ in range(2)] == [3, 3]
