"""The recipe: round trip, what it refuses and in which words, and when it was reproduced."""

from pathlib import Path
from typing import Any

import pytest

from mfcompile.errors import InputError
from mfcompile.recipe import Recipe, ReproductionError


def _recipe(tmp_path: Path, **options: Any) -> Recipe:
    return Recipe(source=tmp_path / "models" / "model.py", **options)


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("recipe_version: 1\nsource: model.py\n" + text)
    return path


def test_round_trip_keeps_every_field(tmp_path: Path) -> None:
    recipe = _recipe(
        tmp_path,
        sparsity={"vision": 0.5, "text": 0.75},
        criterion="itersnip",
        criterion_options={"steps": 20},
        allocation={"text.*": 0.5, "*": 0.75},
        pattern="4x1",
        update="sparsegpt",
        update_options={"damping": 0.1},
        rounding="official",
        seed=3,
        targets=("text.*",),
        ignore=("re:head", "Linear"),
        regions={"text.*": "text"},
        modalities={"x": "vision"},
        padding_mask="mask",
        calibration=tmp_path / "data" / "batches.npz",
        num_calibration_samples=8,
        precision="float64",
        weighting="cip",
        tokens={"region:vision": 0.5},
        token_scorer="norm",
        token_rest="merge",
        token_restore="last",
        token_outputs="shorter",
        method="comp+itersnip",
        flops=0.4,
        method_options={"strategy": "comp", "step": 0.1},
        statistics=tmp_path / "old" / "statistics.safetensors",
        onnx=False,
        format="dense",
        values="fp16",
        inline=True,
        external_data=False,
        load_budget=4.5,
        split="regions",
        evaluate=False,
        digest="d" * 64,
        fingerprint="f" * 64,
        versions={"torch": "2.11"},
    )
    default = _recipe(tmp_path)
    unchanged = {key for key in vars(recipe) if getattr(recipe, key) == getattr(default, key)}
    assert unchanged == {"source"}, "the test must exercise every field with something other than its default"
    assert Recipe.load(recipe.save(tmp_path / "out" / "recipe.yaml")) == recipe


def test_default_round_trip(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    assert Recipe.load(recipe.save(tmp_path / "recipe.yaml")) == recipe


def test_source_is_relative_to_the_final_directory(tmp_path: Path) -> None:
    path = _recipe(tmp_path).save(tmp_path / ".staging" / "deep" / "recipe.yaml", beside=tmp_path / "out")
    text = path.read_text()
    assert "source: ../models/model.py" in text
    assert str(tmp_path) not in text


def test_recipe_moves_with_its_source(tmp_path: Path) -> None:
    _recipe(tmp_path).save(tmp_path / "out" / "recipe.yaml")
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "out"
    (tmp_path / "out").rename(moved)
    assert Recipe.load(moved / "recipe.yaml").source == tmp_path / "elsewhere" / "models" / "model.py"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sparsty: 0.5", r"recipe\.yaml, line 3: unknown key 'sparsty'\. Did you mean sparsity\?"),
        ("zzz: 1", r"line 3: unknown key 'zzz'\. A recipe has: .*sparsity"),
        ("true: 1", r"line 1: unknown key 'True'"),
        ("sparsity: 63", r"line 3: sparsity: 63 is not in \[0, 1\).*Did you mean 0\.63\?"),
        ("sparsity: 1", r"line 3: sparsity: 1 is not in \[0, 1\)"),
        ("sparsity: -0.1", r"-0\.1 is not in \[0, 1\)"),
        ("sparsity: .nan", r"nan is not in \[0, 1\)"),
        ("sparsity: lots", r"'lots' is not a number"),
        ("sparsity: true", r"True is not a number"),
        ("seed: 1\nformat: coo", r"line 4: format: 'coo' is none of packed, dense"),
        ("values: int4", r"values: 'int4' is none of fp32, fp16, int8"),
        ("rounding: [exact]", r"rounding: \['exact'\] is none of exact, official"),
        ("targets: text.*", r"targets: 'text\.\*' is not a list of patterns"),
        ("ignore: null", r"ignore: None is not a list of patterns"),
        ("regions: [a]", r"regions: \['a'\] is not a mapping"),
        ("regions: {a: 1}", r"regions: .* is not a mapping from names to names"),
        ("num_calibration_samples: 0", r"num_calibration_samples: 0 is not a whole number of at least 1"),
        ("seed: -1", r"seed: -1 is not a whole number"),
        ("onnx: maybe", r"onnx: 'maybe' is neither true nor false"),
        ("seed: 1\nseed: 2", r"line 4: the key seed is given twice"),
        ("a: [", r"recipe\.yaml, line \d: this is not valid YAML"),
        ("!!python/object/apply:os.system ['true']: 1", r"this is not valid YAML|could not determine a constructor"),
    ],
)
def test_refusals_name_file_line_and_key(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path, line)
    with pytest.raises(InputError, match=message):
        Recipe.load(path)


def test_options_given_directly_are_held_to_the_same_rules(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sparsity: 63 is not in \[0, 1\).*Did you mean 0\.63\?"):
        _recipe(tmp_path, sparsity=63)
    with pytest.raises(InputError, match="format: 'coo' is none of packed, dense"):
        _recipe(tmp_path).override({"format": "coo"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no recipe: it holds no keys"),
        ("- a\n", "is no recipe"),
        ("source: model.py\n", "names no recipe_version; this version of mfcompile reads recipe_version 1"),
        ("recipe_version: 2\nsource: model.py\n", "is of recipe_version 2"),
        ("recipe_version: 1\n", "the key source is missing"),
        ("recipe_version: 1\nsource: 3\n", "line 2: source: it is not a path"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Recipe.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe .*none\.yaml cannot be read"):
        Recipe.load(tmp_path / "none.yaml")


def test_override_of_a_mask_option_forgets_the_digest(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, digest="d" * 64, fingerprint="f" * 64, versions={"torch": "2"})
    other = recipe.override({"sparsity": 0.9})
    assert (other.sparsity, other.digest, other.fingerprint, other.versions) == (0.9, "", "", {})
    assert recipe.mask_options_changed(other) == ("sparsity",)
    shorter = recipe.override({"tokens": 0.7, "token_outputs": "shorter"})
    assert recipe.mask_options_changed(shorter) == ("tokens", "token_outputs")


def test_override_of_a_storage_option_keeps_the_digest(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, digest="d" * 64)
    assert recipe.override({"format": "dense", "evaluate": False}).digest == "d" * 64


def test_reproduced(tmp_path: Path) -> None:
    _recipe(tmp_path, digest="d" * 64, fingerprint="f", versions={"torch": "2"}).check_reproduced("d" * 64, "g", {})
    _recipe(tmp_path).check_reproduced("e" * 64, "g", {})


@pytest.mark.parametrize(
    ("fingerprint", "torch", "cause"),
    [
        ("other", "2.11", "weights have changed since the recipe was written"),
        ("f", "2.12", r"versions changed: torch 2\.11 -> 2\.12"),
        ("f", "2.11", "calibration data has changed or is drawn at random"),
    ],
)
def test_not_reproduced_says_why(tmp_path: Path, fingerprint: str, torch: str, cause: str) -> None:
    recipe = _recipe(tmp_path, digest="d" * 64, fingerprint="f", versions={"torch": "2.11"})
    with pytest.raises(ReproductionError, match=cause) as caught:
        recipe.check_reproduced("e" * 64, fingerprint, {"torch": torch})
    assert "records masks dddddddddddddddd…, this run gave eeeeeeeeeeeeeeee…" in str(caught.value)
