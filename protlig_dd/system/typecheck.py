"""Check every call of a function in this package against the function's jaxtyping annotations.

jaxtyping's import hook rewrites a module before the module is compiled. While the hook executes a module, the hook
changes the name under which Python stores bytecode. The module of a command, however, is executed by `python -m`, which
takes the bytecode from the loader's `get_code`. With the hook alone, the instrumented bytecode of every command was
therefore stored under the ordinary name, and a later run without the hook loaded this bytecode
(patrick-kidger/jaxtyping#329). The hook alone also compiles every package again that a module imports.

The loader below uses a separate name for modules and for commands, and only for this package.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

import jaxtyping
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

ORDINARY_SUFFIX, INSTRUMENTED_SUFFIX = ".pyc", f".shapes-{jaxtyping.__version__}.pyc"


def install(package: str) -> None:
    """Instrument the modules of `package` that are imported from now on. Call it in the package's `__init__`."""
    warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)  # from omegaconf's hints
    finder = jaxtyping.install_import_hook(package, "beartype.beartype").hook
    sys.meta_path[sys.meta_path.index(finder)] = CheckedFinder(finder)


class CheckedFinder(MetaPathFinder):
    """jaxtyping's finder, with a `CheckedLoader` for each module that it instruments."""

    def __init__(self, finder: MetaPathFinder) -> None:
        self.finder = finder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = self.finder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader)
        return spec


class CheckedLoader(SourceFileLoader):
    """Compile like the loader `instrumenting`, and store the bytecode as `__pycache__/<name>.shapes-<version>.pyc`."""

    def __init__(self, instrumenting: SourceFileLoader) -> None:
        super().__init__(instrumenting.name, instrumenting.path)
        self.source_to_code = instrumenting.source_to_code  # type: ignore[method-assign]

    def get_data(self, path: str) -> bytes:
        return super().get_data(bytecode_path(path))

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(bytecode_path(path), data, _mode=_mode)  # type: ignore[call-arg]


def bytecode_path(path: str) -> str:
    """Return the path of the instrumented bytecode for the .pyc file `path`; other paths are unchanged."""
    return path.removesuffix(ORDINARY_SUFFIX) + INSTRUMENTED_SUFFIX if path.endswith(ORDINARY_SUFFIX) else path
