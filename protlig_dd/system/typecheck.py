"""Check every call of a function in this package against the function's jaxtyping annotations.

jaxtyping's import hook instruments a module: it adds the checks to the source before Python compiles it. While the hook
executes the module, it also changes the names of bytecode files, so that the instrumented bytecode does not replace the
ordinary bytecode. The hook alone has two faults:

- For the module of a command, `python -m` does not call the hook's `exec_module`, so the names are not changed. The
  instrumented bytecode of this module is stored under the ordinary name, and a later run without the hook loads it
  (patrick-kidger/jaxtyping#329).
- The changed names also apply to all packages that the module imports, so these packages are compiled again.

The loader below therefore always stores instrumented bytecode under a separate name, also for the module of a command.
The bytecode of other packages keeps its ordinary name.
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
