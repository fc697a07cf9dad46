"""Read or replace the outputs of a network's modules by name. Does not use Hydra (docs/inspect.md)."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from protlig_dd.model.block import Block
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers.ttt import TTT

Hook = Callable[[Tensor], Tensor | None]
"""Receives a module's output. Returns None, or a tensor of the same shape, dtype and device that replaces it."""


@contextmanager
def hooks(network: DiT, functions: Mapping[str, Hook]) -> Iterator[None]:
    """Call functions on the outputs of named modules while the body runs; the hooks are removed even if it raises.

    Args:
        functions: name of a module, as in the names of weights: `embedding`, `blocks.3`, `blocks.3.attention_out`,
            `head`. A function receives the output itself, usually (total tokens of the pack, width), and must not
            change it in place. If it returns a tensor, that replaces the output for the rest of the network.

    Raises:
        ValueError: no module has the name, or the module is never called itself (nothing is hooked then). The network
            is in training mode and its blocks are compiled or recorded, so hooks would not run. In the body: a
            replacement is not a tensor of the output's shape, dtype and device.
    """
    modules = called_modules(network)
    for name in functions:
        if name not in modules:
            raise ValueError(unknown_module(network, name, list(modules)))
    if network.training and (network.graphed or any(getattr(block, "compiled", None) for block in network.blocks)):
        raise ValueError("hooks do not run in compiled training steps; put the network in evaluation mode first")
    with ExitStack() as stack:
        for name, function in functions.items():
            handle = modules[name].register_forward_hook(checked(name, function))
            stack.callback(handle.remove)
        yield


def checked(name: str, function: Hook) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
    """Return a forward hook that calls `function` and checks its replacement."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
        replacement = function(output)
        if replacement is None:
            return None
        if not isinstance(replacement, Tensor):
            raise ValueError(f"the hook on {name} returned {type(replacement).__name__}; return a tensor or None")
        expected, found = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (output, replacement))
        if expected != found:
            raise ValueError(f"the hook on {name} returned {found} in place of {expected}")
        return replacement

    return hook


def called_modules(network: DiT) -> dict[str, nn.Module]:
    """Return the modules that a forward pass calls, by name.

    The others only contain modules, as ModuleList does, or contain weights that the network reads without a call.
    """
    uncalled = set[nn.Module]()
    if network.positions.is_biased():
        uncalled |= set(network.positions.modules())  # `bias` reads the weights of whole tables
    for block in network.blocks:
        if isinstance(block, Block) and isinstance(block.mixer, TTT):
            uncalled.add(block.mixer.heads_norm)  # computed in the dtype of the state
    return {
        name: module
        for name, module in network.named_modules()
        if name and type(module).forward is not nn.Module.forward and module not in uncalled
    }


def unknown_module(network: DiT, name: str, known: Sequence[str]) -> str:
    """Return an error message for a name that cannot be hooked, with the nearest one that can."""
    if not name:
        return "'' is not the name of a module; give a name such as 'embedding', 'blocks.0.qkv', 'blocks.0' or 'head'"
    exists = name in dict(network.named_modules())
    problem = "is never called itself, so a hook would not run" if exists else "is not a module of this network"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"{name!r} {problem}; did you mean {nearest[0]!r}?"
