"""The command as a whole: help, mistakes on the command line, errors and exit statuses."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mfcompile.errors import CalibrationError, InputError, ParityError
from mfcompile.recipe import ReproductionError

COMMANDS = ("prune", "inspect", "export", "unpack", "verify")


@pytest.fixture
def prune_does(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Replace what ``mfcompile prune`` does."""

    def replace(action: Callable[[], int]) -> None:
        monkeypatch.setattr("mfcompile.cli.prune.run", lambda args, terminal: action())

    return replace


def _raise(error: BaseException) -> Callable[[], int]:
    def action() -> int:
        raise error

    return action


def test_help_lists_every_command(run: Any) -> None:
    result = run("--help")
    assert result.status == 0
    assert all(f"    {command}" in result.out for command in COMMANDS)
    assert "exit status:" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches(run: Any, command: str) -> None:
    result = run(command, "--help")
    assert result.status == 0
    assert f"usage: mfcompile {command}" in result.out
    assert result.out.count(f"  mfcompile {command} ") >= 2, "at least two examples"
    assert "--output_dir" not in result.out


def test_importing_the_command_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'onnx', 'onnxruntime', 'transformers', 'matplotlib'}"
    code = f"import sys, mfcompile.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command_shows_help_and_is_a_mistake(run: Any) -> None:
    result = run()
    assert result.status == 2
    assert "start here:" in result.err


def test_version(run: Any) -> None:
    from mfcompile import __version__

    assert run("--version").out == f"mfcompile {__version__}\n"


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["prune", "m.py", "--sparsty", "0.5"], ["unrecognized arguments: --sparsty 0.5", "Did you mean --sparsity instead"]),
        (["prune", "m.py", "--sparse=0.5"], ["unrecognized arguments: --sparse=0.5"]),
        (["inspect", "m.py", "--overwrite"], ["unrecognized arguments: --overwrite", "See mfcompile inspect --help."]),
        (["prune", "--ignore", "a", "m.py"], ["arguments are required: SOURCE", "Put SOURCE first"]),
        (["prune", "m.py", "--sparsity", "63%"], ["'63%' is not a number such as 0.63. Did you mean 0.63?"]),
        (["prune", "m.py", "--sparsity", "many"], ["'many' is not a number such as 0.63"]),
        (["prune", "m.py", "--format", "coo"], ["--format", "'coo'", "packed", "dense"]),
        (["prune", "m.py", "--values", "int4"], ["--values", "'int4'", "fp16"]),
        (["prune", "m.py", "--regions", "a.*"], ["'a.*' is not of the form PATTERN=REGION"]),
        (["prune", "m.py", "--modality", "=vision"], ["'=vision' is not of the form NAME=MODALITY"]),
        (["prune", "m.py", "--seed", "x"], ["'x' is not a whole number"]),
        (["export", "m.py", "-o", "m.onnx"], ["arguments are required: --masks"]),
        (["prun", "m.py"], ["invalid choice: 'prun'"]),
    ],
)
def test_mistakes_are_one_message_with_a_hint(run: Any, words: list[str], messages: list[str]) -> None:
    result = run(*words)
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    for message in messages:
        assert message in result.err


def test_a_forgotten_command_is_suggested(run: Any, tmp_path: Path) -> None:
    model = tmp_path / "model.py"
    model.touch()
    result = run(model)
    assert result.status == 2
    assert f"Did you mean: mfcompile prune {model}" in result.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("the input is wrong. Do this"), 2),
        (CalibrationError("no token. Do that"), 2),
        (ParityError("they differ"), 1),
        (ReproductionError("other masks"), 1),
    ],
)
def test_errors_on_purpose(run: Any, prune_does: Any, error: Exception, status: int) -> None:
    prune_does(_raise(error))
    result = run("prune", "m.py")
    assert (result.status, result.out, result.err) == (status, "", f"error: {error}\n")


def test_error_text_is_shown_as_it_is(run: Any, prune_does: Any) -> None:
    prune_does(_raise(InputError("the rows [0:4] of [bold]x " + "long " * 60)))
    assert "the rows [0:4] of [bold]x " + "long " * 60 in run("prune", "m.py").err


def test_an_unexpected_error_is_short(run: Any, prune_does: Any) -> None:
    prune_does(_raise(ZeroDivisionError("division by zero")))
    result = run("prune", "m.py")
    assert result.status == 1
    assert result.err.startswith("error: ZeroDivisionError: division by zero\n")
    assert "with --debug" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("error", "status"), [(InputError("wrong"), 2), (ZeroDivisionError(), 1)])
def test_debug_shows_the_traceback_and_keeps_the_status(run: Any, prune_does: Any, error: Exception, status: int) -> None:
    prune_does(_raise(error))
    result = run("prune", "m.py", "--debug")
    assert result.status == status
    assert "Traceback" in result.err
    assert "in action" in result.err


def test_interrupted(run: Any, prune_does: Any) -> None:
    prune_does(_raise(KeyboardInterrupt()))
    result = run("prune", "m.py")
    assert (result.status, result.err) == (2, "error: interrupted; nothing is left half written\n")


def test_a_request_to_terminate_unwinds_too(run: Any, prune_does: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound = []

    def action() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not reached")
        finally:
            unwound.append(True)

    prune_does(action)
    assert (run("prune", "m.py").status, unwound) == (2, [True])
    assert signal.getsignal(signal.SIGTERM) is before


def test_warnings_of_libraries_are_kept_back_unless_debugging(run: Any, prune_does: Any) -> None:
    import warnings

    def action() -> int:
        warnings.warn("from underneath", UserWarning, stacklevel=1)
        return 0

    prune_does(action)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert run("prune", "m.py").status == 0
        assert seen == []
        assert run("prune", "m.py", "--debug").status == 0
    assert [str(item.message) for item in seen] == ["from underneath"]


def test_the_reader_of_a_pipe_may_leave() -> None:
    code = "from mfcompile.cli import main; import sys; sys.exit(main(['prune', '--help']))"
    command = f'{sys.executable} -c "{code}" | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: mfcompile prune")
    assert "Traceback" not in done.stderr
