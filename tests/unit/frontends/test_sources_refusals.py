from pathlib import Path
from textwrap import dedent

import pytest

from mfcompile.errors import InputError
from mfcompile.frontends.sources import ModelSource, load_source

_MODEL = """
    import torch
    from torch import nn
    model = nn.Linear(3, 2)
    example_inputs = torch.ones(2, 3)
"""


def _write(folder: Path, text: str, name: str = "model.py") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(dedent(text))
    return path


def _load(folder: Path, text: str) -> ModelSource:
    return load_source(_write(folder, text))


def _load_with(folder: Path, text: str) -> ModelSource:
    return _load(folder, dedent(_MODEL) + dedent(text))


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_source(path)
    return str(caught.value)


def test_missing_file_names_a_close_one(tmp_path: Path) -> None:
    _write(tmp_path, _MODEL, "model.py")
    assert _refusal(tmp_path / "modle.py") == (
        f"{tmp_path / 'modle.py'} does not exist (looked in {Path.cwd()}). Did you mean {tmp_path / 'model.py'}?"
    )


def test_missing_file_that_could_be_a_hub_name() -> None:
    message = _refusal(Path("some-org/some-name"))
    assert "run `hf download some-org/some-name --local-dir DIR` and name DIR" in message
    assert "Name a Python file that defines `model` (or `build_model()`) and `example_inputs`" in message


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("model.pt", "is a pickled file: loading it can run any code, so mfcompile does not. Write a model.py"),
        ("model.safetensors", "is only a part of a model. Name its directory"),
        ("model.txt", "is not a Python file. Name a Python file that defines `model`"),
    ],
)
def test_other_files(tmp_path: Path, name: str, problem: str) -> None:
    path = _write(tmp_path, "", name)
    assert f"{path} {problem}" in _refusal(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("model.py", "is a directory without config.json. It holds a model.py: name"),
        ("adapter_config.json", "it holds an adapter (adapter_config.json), not a model. Merge the adapter"),
        ("notes.txt", "so it is no Hugging Face model. Name a Python file"),
    ],
)
def test_other_directories(tmp_path: Path, content: str, problem: str) -> None:
    _write(tmp_path, "", content)
    assert problem in _refusal(tmp_path)


def test_a_file_that_raises_names_the_line_of_the_sibling_and_keeps_the_cause(tmp_path: Path) -> None:
    sibling = _write(tmp_path, "def build():\n    return {}['width']\n", "modeling.py")
    path = _write(tmp_path, "from modeling import build\nmodel = build()\n")
    with pytest.raises(InputError) as caught:
        load_source(path)
    assert str(caught.value) == (f"importing {path} failed at {sibling}:2: KeyError: 'width'. Correct that line")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nmodel = (\n", "model.py:2: SyntaxError: '(' was never closed"),
        ("\nimport no_such_package_anywhere\n", "Install no_such_package_anywhere, or put it beside model.py"),
        ("import sys\nsys.exit(3)\n", "model.py:2: SystemExit(3). Move code that ends the program"),
        ("import torch\ntorch.ones(2, 3) @ torch.ones(2, 3)\n", "model.py:2: RuntimeError: mat1 and mat2 shapes"),
    ],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in _refusal(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "from torch import nn\ndef make_model(): ...\nclass Net(nn.Module): ...\nnet = Net()\n",
            "so there is nothing to prune. It does define net (a Net), Net (the class Net), make_model() (a function). "
            "Add `model = net`",
        ),
        ("from torch.nn import Linear\n", "Add `model = ...`, an nn.Module, or a function build_model() that returns one"),
    ],
)
def test_no_model(tmp_path: Path, text: str, problem: str) -> None:
    path = _write(tmp_path, text)
    message = _refusal(path)
    assert message.startswith(f"{path} defines neither model nor build_model(), ")
    assert message.endswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "class Net(nn.Module): ...\nmodel = Net",
            "model in {} is the class Net, not an nn.Module. Make an instance: model = Net(...)",
        ),
        ("def model(): ...", "is a function, not an nn.Module. Call it (model = model()), or name it build_model"),
        ("model = nn.Linear(1, 1).state_dict()", "is an OrderedDict, not an nn.Module. Weights alone cannot run"),
        ("model = 3", "model in {} is an int, not an nn.Module. Assign the torch module to model"),
        ("def build_model(): return None", "build_model() in {} is a NoneType, not an nn.Module. Let build_model() return"),
        ("build_model = 3", "build_model in {} is an int, not a function. Define build_model()"),
        (
            "def build_model(size): ...",
            "build_model(size) in {} cannot be called as build_model(): missing a required argument",
        ),
        ("def build_model(): return 1 / 0", "calling build_model() failed at {}:2: ZeroDivisionError: division by zero."),
    ],
)
def test_unusable_models(tmp_path: Path, text: str, problem: str) -> None:
    path = _write(tmp_path, f"from torch import nn\n{text}\n")
    assert problem.format(path) in _refusal(path)


def test_no_example_inputs(tmp_path: Path) -> None:
    path = _write(tmp_path, "import torch\nmodel = torch.nn.Linear(1, 1)\ndummy_input = torch.ones(1, 1)\n")
    assert _refusal(path) == (
        f"{path} defines no example_inputs, so the model cannot be run and captured. It does define dummy_input. "
        f"Add `example_inputs = {{...}}`, a dict of tensors whose keys are parameters of forward, "
        f"or a function of that name that returns one"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def example_inputs(): pass", "example_inputs() in {} returned None. Let it return a dict of tensors"),
        ("def example_inputs(n): pass", "example_inputs(n) in {} cannot be called as example_inputs()"),
        ("evaluate = 0.5", "evaluate in {} is a float, not a function. Define evaluate(model)"),
        ("def evaluate(): pass", "evaluate() in {} cannot be called as evaluate(model): too many positional arguments"),
        ("def calibration_batches(n): pass", "calibration_batches(n) in {} cannot be called as calibration_batches()"),
        ("modalities = ['vision']", 'modalities in {} is a list, not a dict of strings. Write {{"pixel_values": "vision"}}'),
        ("regions = {{'head': 3}}", "regions in {} maps 'head' to 3: both must be strings"),
        ("padding_mask = 3", "padding_mask in {} is an int, not the name of an input"),
    ],
)
def test_unusable_options(tmp_path: Path, text: str, problem: str) -> None:
    path = _write(tmp_path, dedent(_MODEL) + text.format() + "\n")
    assert problem.format(path) in _refusal(path)


def test_evaluate_that_raises_names_its_line(tmp_path: Path) -> None:
    source = _load_with(tmp_path, "def evaluate(model):\n    raise FileNotFoundError('coco.json')")
    assert source.evaluate is not None
    with pytest.raises(InputError, match=r"calling evaluate\(model\) failed at .*model.py:7: .*coco.json. Correct that line$"):
        source.evaluate(source.model)
