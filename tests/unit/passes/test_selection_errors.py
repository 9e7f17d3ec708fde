"""What select_masks refuses, in words: options that do not fit, what is missing, and criteria of one's own that go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import mfcompile
from mfcompile.errors import CalibrationError, InputError
from mfcompile.passes.criteria import registry
from tests.made_sites import MadeModel, made
from tests.models import vlm_captured, vlm_regions, vlm_statistics


def select(**options: Any) -> mfcompile.MaskSet:
    return mfcompile.select_masks(vlm_captured(), vlm_regions(), vlm_statistics(), **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name misspelt": (
        {"criterion": "multflow"},
        r"criterion='multflow' is unknown; did you mean multiflow\? choose one of mul",
    ),
    "a name of nothing": ({"criterion": "zzz"}, r"criterion='zzz' is unknown; choose one of multiflow, .*wanda, snip"),
    "a class": ({"criterion": mfcompile.Criterion}, r"must be a name or a Criterion object, .*; make an object of it: Crit"),
    "a number": ({"criterion": 3}, r"criterion must be a name or a Criterion object, got 3$"),
    "an unknown option": (
        {"criterion": "lamp", "criterion_options": {"steps": 3}},
        r"'lamp' has no option 'steps'; it has none",
    ),
    "no such option": (
        {"criterion": "itersnip", "criterion_options": {"step": 3}},
        r"'itersnip' has no option 'step'; it has batches_per_step, schedule, steps",
    ),
    "allocation unknown": (
        {"allocation": "erc"},
        r"allocation='erc' is unknown; choose one of magnitude-per-region, .*, erk, or",
    ),
    "allocation a list": (
        {"allocation": ["erk"]},
        r"allocation must be a name, or pattern of weights -> sparsity, got \['erk'\]",
    ),
    "allocation empty": ({"allocation": {}}, r"allocation must be a name, or pattern of weights -> sparsity, got \{\}"),
    "layers and a sparsity": (
        {"allocation": {"*": 0.5}, "sparsity": 0.5},
        r"the allocation gives every layer a sparsity of its own, and sparsity 0.5 was asked for as well: leave one",
    ),
    "layers left out": ({"allocation": {"vision.*": 0.5}}, r"no pattern matches text\.0\.attention\.query\.weight and 31 more"),
    "a layer that is not there": (
        {"allocation": {"*": 0.5, "audio.*": 0.1}},
        r"allocation: the pattern 'audio\.\*' matches no",
    ),
    "a layer by percent": ({"allocation": {"*": 50}}, r"allocation: the sparsity of '\*' must be in \[0, 1\).*mean 0\.5\?"),
    "global and regions": (
        {"allocation": "score-global", "sparsity": {"vision": 0.5, "text": 0.6, "fusion": 0.7}},
        r"'score-global' sets one threshold for the whole model, but every region .* Use 'score-per-region', or one sparsity",
    ),
    "magnitude-global and regions": (
        {"allocation": "magnitude-global", "sparsity": {"vision": 0.5, "text": 0.6, "fusion": 0.7}},
        r"Use 'magnitude-per-region', or one sparsity",
    ),
    "a region left out": (
        {"sparsity": {"vision": 0.5}},
        r"the region 'text' has none; this model's regions are vision, text, f",
    ),
    "a region that is not there": (
        {"sparsity": {"vision": 0.5, "text": 0.6, "fusion": 0.7, "audio": 0.1}},
        r"there is no region 'audio'; this model's regions are vision, text, fusion\. Give each of them one; 0 keeps it dense",
    ),
    "a region by percent": (
        {"sparsity": {"vision": 50, "text": 0.6, "fusion": 0.7}},
        r"the sparsity of vision must be in \[0, 1\), .*; got 50; did you mean 0\.5\?",
    ),
    "percent": (
        {"sparsity": 63},
        r"sparsity must be in \[0, 1\), the fraction of weights removed; got 63; did you mean 0\.63\?",
    ),
    "text": ({"sparsity": "0.63"}, r"sparsity must be a number in \[0, 1\), the fraction of weights removed; got '0\.63'"),
    "all": ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\).*got 1$"),
    "N:M and a sparsity": (
        {"pattern": "2:4", "sparsity": 0.63},
        r"the pattern 2:4 removes 0\.5 of every layer, but sparsity 0\.63 was asked for\. Leave the sparsity out, or choose",
    ),
    "N:M and regions": (
        {"pattern": "2:4", "sparsity": {"vision": 0.5, "text": 0.5, "fusion": 0.7}},
        r"the pattern 2:4 removes 0\.5 of every layer, but sparsity \{.*\} was asked for",
    ),
    "N:M and an unknown region": ({"pattern": "2:4", "sparsity": {"audio": 0.5}}, r"there is no region 'audio'"),
    "N:M and an allocation": ({"pattern": "2:4", "allocation": "erk"}, r"nothing to allocate: leave allocation='erk' out"),
    "N not below M": ({"pattern": "4:4"}, r"pattern='4:4': N of M inputs stay, with 1 <= N < M <= 64; 2:4 keeps two of every"),
    "pattern unknown": ({"pattern": "8x1"}, r"pattern='8x1' is unknown; choose unstructured, N:M \(2:4\), 1x4, 4x1 or 16x1$"),
    "pattern turned": ({"pattern": "1x16"}, r"Blocks are outputs x inputs: did you mean 16x1\?"),
    "pattern None": ({"pattern": None}, r"pattern=None is unknown"),
    "rounding unknown": ({"rounding": "floor"}, r"rounding='floor' is unknown; choose one of exact, official"),
    "official blocks": (
        {"rounding": "official", "pattern": "4x1"},
        r"which knows single weights only: leave it out with the .*4x1",
    ),
    "official N:M": ({"rounding": "official", "pattern": "2:4"}, r"rounding='official' repeats what the published code does"),
    "seed a word": ({"seed": "first"}, r"seed must be an integer, got 'first'"),
    "seed of no integer": ({"seed": 1.0, "criterion": "random"}, r"seed must be an integer, got 1\.0"),
    "seed of more than 64 bits": (
        {"seed": 2**64, "criterion": "random"},
        r"seed must fit into 64 bits, .* got 18446744073709551616",
    ),
    "update unknown": (
        {"update": "obs"},
        r"update='obs' is unknown; choose sparsegpt, least-squares, gradual, or None to leave weights as they are",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        select(**options)


@pytest.mark.parametrize(("criterion", "options", "message"), [
    ("multiflow", {}, r"the criterion 'multiflow' needs calibration statistics; run calibrate\(\) first"),
    ("wanda", {}, r"the criterion 'wanda' needs calibration statistics"),
    ("snip", {}, r"the criterion 'snip' needs gradients, and there is no way to them without a loss_fn\. Define `loss_fn"),
    ("snip", {"batches": [1]}, r"without a loss_fn"),
    ("snip", {"loss_fn": lambda module, batch: None}, r"'snip' needs gradients, .* without calibration batches\. .*no loss"),
    ("magnitude", {"update": "sparsegpt"}, r"update='sparsegpt' runs the model: give calibration batches"),
])  # fmt: skip
def test_what_is_needed_is_named(criterion: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        mfcompile.select_masks(vlm_captured(), vlm_regions(), None, criterion=criterion, **options)


def test_statistics_of_a_needless_criterion_may_be_missing() -> None:
    for criterion in ("magnitude", "lamp", "l2", "random"):
        masks = mfcompile.select_masks(vlm_captured(), vlm_regions(), None, criterion=criterion)
        assert masks.weight_count - masks.kept_count == int(0.63 * masks.weight_count)


# --- blocks that do not fit ---


def test_more_blocks_than_there_are_is_refused_by_group() -> None:
    model = made({"vision": [(8, 4)], "text": [(7, 4), (5, 4)]})
    with pytest.raises(
        InputError, match=r"sparsity 0\.9 of text takes 10 blocks of 4 weights, but its layers hold 8 whole ones\."
    ):
        model.select(pattern="4x1", sparsity=0.9)
    with pytest.raises(
        InputError, match=r"sparsity 0\.9 of the model takes 18 blocks of 4 .* hold 16 .* leave layers with few"
    ):
        model.select(pattern="4x1", sparsity=0.9, allocation="uniform")
    with pytest.raises(InputError, match=r"sparsity 0\.8 of text0 takes 5 blocks of 4 weights, but it holds 4 whole"):
        model.select(pattern="4x1", allocation={"*": 0.5, "text0": 0.8})
    masks = model.select(pattern="4x1", sparsity=0.5)
    assert [str(item) for item in masks.diagnostics] == [
        "text0: its last 3 of 7 rows fill no block of 4 and stay dense",
        "text1: its last 1 of 5 rows fill no block of 4 and stay dense",
    ]


# --- weights that cannot be ranked ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("criterion", ["multiflow", "magnitude", "lamp", "l2", "wanda"])
def test_a_broken_weight_is_named_whatever_reads_it(criterion: str, pattern: str, value: float) -> None:
    model = MadeModel()
    model.add("sound", torch.randn(8, 8))
    model.add("broken", torch.randn(8, 8).index_fill(0, torch.tensor([3]), value))
    with pytest.raises(InputError, match=r"broken holds 8 NaN or infinite values: it cannot be ranked\. Check the checkpoint"):
        model.select(criterion=criterion, pattern=pattern)


# --- criteria of one's own ---


@dataclass(frozen=True)
class Mine(mfcompile.Criterion):
    """Scores by whatever it was given."""

    name: ClassVar[str] = "mine"
    give: Any = None

    def score(self, site: mfcompile.SiteData) -> Tensor:
        result: Tensor = self.give(site.weight)
        return result


BROKEN: dict[str, tuple[Any, str]] = {
    "turned": (
        lambda weight: weight[:4].T,
        r"'mine' scored vision0 with \(8, 4\) torch.float32; a score is a float tensor of the weight's shape \(8, 8\)",
    ),
    "whole numbers": (
        lambda weight: (weight > 0).int(),
        r"scored vision0 with \(8, 8\) torch\.int32; a score is a float tensor",
    ),
    "a list": (lambda weight: weight.tolist(), r"scored vision0 with list; a score is a float tensor"),
    "nothing": (lambda weight: None, r"scored vision0 with NoneType"),
    "NaN": (
        lambda weight: weight.abs().sub(9).log(),
        r"gave 64 of the 64 weights of vision0 a score that is NaN or infinite as f",
    ),
    "infinity": (
        lambda weight: weight.abs() / weight.abs().floor(),
        r"'mine' gave \d+ of the 64 weights of vision0 a score that",
    ),
    "too large": (lambda weight: weight.double() * 1e39, r"a score that is NaN or infinite as float32"),
    "an error": (
        lambda weight: weight @ torch.ones(3),
        r"the criterion 'mine' failed on vision0 of shape \(8, 8\) \(RuntimeError: size mismatch.*Correct the class Mine",
    ),
}


@pytest.mark.parametrize("allocation", ["score-global", "uniform", "magnitude-per-region"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_criterion_that_goes_wrong_is_named_with_the_layer(case: str, allocation: str) -> None:
    give, message = BROKEN[case]
    with pytest.raises(InputError, match=message):
        made({"vision": [(8, 8)], "text": [(8, 8)]}).select(criterion=Mine(give), allocation=allocation)


def test_a_score_may_be_of_any_sign_and_any_float_type_and_ask_for_a_gradient() -> None:
    model = made({"vision": [(8, 8)], "text": [(8, 8)]})
    expected = model.select(criterion=Mine(lambda weight: weight), sparsity=0.5)
    assert float(model.captured.parameter("text0").detach()[expected["text0"]].min()) > -0.2, "the most negative go first"
    assert model.select(criterion=Mine(lambda weight: weight.double()), sparsity=0.5) == expected
    assert model.select(criterion=Mine(lambda weight: weight.clone().requires_grad_()), sparsity=0.5) == expected


class Nameless(mfcompile.Criterion):
    def score(self, site: mfcompile.SiteData) -> Tensor:
        return site.weight


class Needy(Nameless):
    name = "needy"
    needs = frozenset({"hessians"})  # type: ignore[arg-type]


class Needless(Nameless):
    name = "needless"
    needs = "statistics"  # type: ignore[assignment]


class Astray(Nameless):
    name = "astray"
    allocation = "everywhere"


class Scaled(Nameless):
    name = "scaled"

    def scale(self, site: mfcompile.SiteData) -> float:
        return 0.0


class Late(Nameless):
    name = "late"

    def begin(self, sites: Any, seed: int) -> None:
        raise KeyError("begin")


@pytest.mark.parametrize(("criterion", "message"), [
    (Nameless(), r'the criterion Nameless has no name: give the class one, name = "mine"'),
    (Needy(), r"the criterion 'needy' needs frozenset\(\{'hessians'\}\); needs is a frozenset of 'statistics', 'gradients'"),
    (Needless(), r"the criterion 'needless' needs 'statistics'; needs is a frozenset of"),
    (Astray(), r"the criterion 'astray' is of the allocation 'everywhere', which is unknown; choose one of"),
    (Scaled(), r"the criterion 'scaled' gives \S+ the scale 0\.0; it must be a positive number"),
    (Late(), r"the criterion 'late' failed \(KeyError: 'begin'\)\. Correct the class Late"),
])  # fmt: skip
def test_a_class_that_says_too_little_is_refused(criterion: mfcompile.Criterion, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select(criterion=criterion)


def test_options_of_an_object_are_refused() -> None:
    with pytest.raises(InputError, match="options of a criterion go with its name; Mine was given as an object"):
        select(criterion=Mine(), criterion_options={"give": None})


# --- entry points ---


class Abstract(mfcompile.Criterion):
    """Has no score."""

    name = "abstract"


NOT_A_CLASS = Mine()


@pytest.mark.parametrize(("value", "message"), [
    ("no_such_package:Thing", r"'theirs' is registered as no_such_package:Thing, which cannot be imported \(ModuleNotF"),
    ("tests.made_sites:Nothing", r"registered as tests.made_sites:Nothing, which cannot be imported \(AttributeError.*Repair"),
    ("builtins:dict", r"'theirs' is registered as builtins:dict, which is no subclass of mfcompile\.Criterion\. Reg"),
    ("tests.unit.passes.test_selection_errors:NOT_A_CLASS", r"is no subclass of mfcompile\.Criterion"),
    ("tests.unit.passes.test_selection_errors:Abstract", r"'theirs' cannot be made: .*abstract.*score.* Every option needs"),
])  # fmt: skip
def test_an_entry_point_that_does_not_hold_is_named(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", lambda: {"theirs": EntryPoint("theirs", value, registry.ENTRY_POINT_GROUP)})
    assert "theirs" in registry.names()
    with pytest.raises(InputError, match=message):
        select(criterion="theirs")
