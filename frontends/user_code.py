"""Running a user's Python file so that it finds its siblings, and so that two files never see each other's."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from mfcompile.errors import InputError, MfcompileError

_COUNTER = itertools.count(1)


class UserModule:
    """A user's Python file as a module, with an import environment of its own.

    While its code runs (``running()``), its folder is the first entry of ``sys.path`` and the modules that it imported
    from there are in ``sys.modules``; in between, neither is. A folder with a ``tokenizer.py`` therefore always gets
    its own, whatever another folder or an installed package of that name has loaded. Modules that are neither in the
    folder nor named like a file in it are shared with the rest of the process, as in any Python program.

    The module itself stays in ``sys.modules`` under a name that no one else uses, so that its dataclasses and its type
    hints resolve. What the code imports lazily while it is *not* run through ``running()`` (inside ``forward``, say)
    does not find siblings: import those at the top of the file.

    Attributes:
        path: the file.
        namespace: the names that the file defines.
    """

    def __init__(self, path: Path) -> None:
        """Execute the file.

        Raises:
            InputError: the file raised; names the line and the exception.
        """
        self.path = path
        self._folder = path.resolve().parent
        self._siblings: dict[str, ModuleType] = {}
        self._depth = 0
        name = f"_mfcompile_source_{next(_COUNTER)}_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        if spec is None or spec.loader is None:
            raise InputError(f"{path} cannot be imported: it is not a Python file. Name a file that ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        importlib.invalidate_caches()
        try:
            self.run(f"importing {path}", spec.loader.exec_module, module)
        except BaseException:
            del sys.modules[name]
            raise
        self.namespace: dict[str, Any] = vars(module)
        self.name = name

    def run(self, doing: str, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in the file's import environment.

        Args:
            doing: what is being done, as the start of an error message ("calling build_model()").
            function: the user's function, or one that calls it.
            args: its arguments.

        Raises:
            InputError: the function raised; names the line of the user's code and the exception.
        """
        try:
            with self.running():
                return function(*args)
        except MfcompileError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(self._explain(doing, error)) from error

    def iterate(self, doing: str, batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """Every item of ``batches()``, each drawn in the file's import environment.

        Raises:
            InputError: drawing an item raised; names the line of the user's code and the exception.
        """
        end = object()
        iterator = self.run(doing, batches)
        while (item := self.run(doing, next, iterator, end)) is not end:
            yield item

    @contextmanager
    def running(self) -> Iterator[None]:
        """The file's import environment, for the duration of the block."""
        if self._depth:
            yield
            return
        self._depth += 1
        entry = str(self._folder)
        hidden = self._hide_namesakes()
        before = set(sys.modules)  # after hiding: what is new at the end came from the user's imports
        sys.modules.update(self._siblings)
        sys.path.insert(0, entry)
        try:
            yield
        finally:
            if entry in sys.path:
                sys.path.remove(entry)
            for name in [name for name in sys.modules if name not in before and self._is_sibling(name)]:
                self._siblings[name] = sys.modules.pop(name)
            sys.modules.update(hidden)
            self._depth -= 1

    def _hide_namesakes(self) -> dict[str, ModuleType]:
        """Take modules from elsewhere that are named like a file beside the user's out of ``sys.modules``.

        The standard library, this package, and packages with extension modules stay: they cannot be loaded twice.
        """
        names = {path.stem for path in self._folder.glob("*.py")}
        names |= {path.parent.name for path in self._folder.glob("*/__init__.py")}
        names -= {*sys.stdlib_module_names, "mfcompile"}
        loaded: dict[str, dict[str, ModuleType]] = {}
        for name, module in list(sys.modules.items()):
            top = name.partition(".")[0]
            if top in names:
                loaded.setdefault(top, {})[name] = module
        hidden: dict[str, ModuleType] = {}
        for top, modules in loaded.items():
            if not self._is_sibling(top) and not any(_is_extension(module) for module in modules.values()):
                hidden.update(modules)
        hidden |= {name: sys.modules[name] for name in self._siblings if name in sys.modules}
        for name in hidden:
            del sys.modules[name]
        return hidden

    def _is_sibling(self, name: str) -> bool:
        """The top-level package of that module was found in the user's folder itself (not in a .venv within it)."""
        top = sys.modules.get(name.partition(".")[0], self._siblings.get(name.partition(".")[0]))
        if top is None or name.startswith("_mfcompile_source_"):
            return False
        places = [Path(place) for place in getattr(top, "__path__", [])]
        file = getattr(top, "__file__", None)
        if not places and file is not None:
            places = [Path(file)]
        return any(place.resolve().parent == self._folder for place in places)

    def _explain(self, doing: str, error: BaseException) -> str:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        advice = "Correct that line"
        if isinstance(error, ModuleNotFoundError):
            advice = f"Install {error.name}, or put it beside {self.path.name}"
        elif isinstance(error, SystemExit):
            what = f"SystemExit({error.code})"
            advice = 'Move code that ends the program or reads the command line under `if __name__ == "__main__":`'
        return f"{doing} failed at {self._location(error)}: {what}. {advice}"

    def _location(self, error: BaseException) -> str:
        """file:line of the user's code that raised, the innermost one of its own folder."""
        if isinstance(error, SyntaxError) and error.filename is not None:
            return f"{error.filename}:{error.lineno}"
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if self._is_own(Path(frame.filename))]
        return f"{own[-1].filename}:{own[-1].lineno}" if own else str(self.path)

    def _is_own(self, file: Path) -> bool:
        return file.is_relative_to(self._folder) and "site-packages" not in file.relative_to(self._folder).parts


def _is_extension(module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)
