"""What every family of the benchmark promises (its contract)."""

from __future__ import annotations

import pytest
import torch

import mfcompile
from benchmarks.tavlp.configuration import mask_config
from benchmarks.tavlp.families import FAMILIES, family
from benchmarks.tavlp.pruners import PRUNERS
from benchmarks.tavlp.tasks import TASKS
from tests.unit.benchmarks.tavlp_runs import TINY

pytestmark = pytest.mark.parametrize("name", FAMILIES)


def test_calibration_is_drawn_by_the_seed_from_two_sources(name: str) -> None:
    first, again, other = (family(name).calibration_batches(seed, 2, 8) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not torch.equal(one["pixel_values"], three["pixel_values"])
        assert not one["attention_mask"].all()
    longest = [int(batch["attention_mask"].sum(1).max()) for batch in first]
    assert longest[1] < longest[0]  # names are shorter than sentences


def test_calibration_is_at_most_a_twentieth_of_pretraining(name: str) -> None:
    mask_config(family(name), PRUNERS["multiflow"], 0.63, 0, TINY)
    too_many = type(TINY)("large", (10**6, 1), {}, {})
    with pytest.raises(ValueError, match="more than 5 %"):
        mask_config(family(name), PRUNERS["multiflow"], 0.63, 0, too_many)


def test_the_loss_is_the_same_at_every_call(name: str) -> None:
    model = family(name).build()
    (batch,) = family(name).calibration_batches(0, 1, 4)
    losses = [float(family(name).loss(model, batch).detach()) for _ in range(2)]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("task", TASKS)
def test_all_masks_find_their_place_in_the_model_of_every_task(name: str, task: str) -> None:
    owner = family(name)
    captured = mfcompile.capture(owner.build(), owner.example_inputs())
    masks = mfcompile.select_masks(captured, mfcompile.infer_regions(captured), criterion="magnitude", sparsity=0.5)
    model = TASKS[task].model(owner)
    moved = mfcompile.transfer_masks(masks, model, owner.mask_names(task))
    lost = [fqn for fqn in moved.unmatched if not fqn.startswith(tuple(owner.left_behind(task)))]
    assert not lost, str(moved)
    state = captured.module.state_dict()
    for target, source in moved.matched.items():
        assert torch.equal(model.get_parameter(target), state[source]), target


def test_the_table_of_words_grows_at_its_end(name: str) -> None:
    owner = family(name)
    words = len(owner.tokenizer())
    model = owner.answering_model(owner.build(), new_words=2, answers=3)
    assert {id(parameter) for parameter in model.new_parameters()} <= {id(parameter) for parameter in model.parameters()}
    batch = owner.example_inputs()
    ids = torch.full_like(batch["input_ids"], words + 1)
    logits = model.answers(model.encode_image(batch["pixel_values"]), ids, batch["attention_mask"])
    assert logits.shape == (len(ids), 3)
