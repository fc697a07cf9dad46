"""Check every function of the package against its jaxtyping annotations, from the moment it is imported.

jaxtyping's import hook rewrites a module before it is compiled. While the hook executes a module, it changes the
name under which Python stores bytecode. `python -m` executes a command's module itself, with bytecode from the loader's
`get_code`. The instrumented bytecode of every command therefore ended up under the ordinary name, and a later run
without the hook loaded it (patrick-kidger/jaxtyping#329). The loader below uses a separate name in both cases, and only
for this package. With the hook alone, every package that a module imports is also compiled again.
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
    """Compile like `instrumenting`, and keep the bytecode in `__pycache__/<name>.shapes-<version>.pyc`."""

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
