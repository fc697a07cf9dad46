"""Read or replace the outputs of a network's modules by name (docs/inspect.md). This module does not use Hydra."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from protlig_dd.model.block import Block
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers.ttt import TTT

Hook = Callable[[Tensor], Tensor | None]
"""Receives a module's output. Returns None, or a tensor of the same shape, dtype and device to replace the output."""


@contextmanager
def hooks(network: DiT, functions: Mapping[str, Hook]) -> Iterator[None]:
    """Call functions on the outputs of named modules while the body of the `with` statement runs.

    The hooks are removed after the body, even if the body raises.

    Args:
        functions: name of a module -> function. Modules are named as in the names of weights: `embedding`, `blocks.3`,
            `blocks.3.attention_out`, `head`. A function receives the module's output itself and not a copy, usually
            (total tokens of the pack, width), and must not change it in place. A tensor that the function returns
            replaces the output for the rest of the network.

    Raises:
        ValueError: no module has the name, the network never calls the module itself, or a value is not a function; or
            the network is in training mode and its blocks are compiled or recorded as CUDA graphs, so hooks would not
            run. In these cases nothing is hooked. While the body runs: a function returns neither None nor a tensor of
            the output's shape, dtype and device.
    """
    if not isinstance(functions, Mapping):
        raise ValueError(f"hooks takes a mapping of module names to functions, got {functions!r:.40}")
    modules = called_modules(network)
    for name, function in functions.items():
        if name not in modules:
            raise ValueError(unknown_module(network, name, modules))
        if not callable(function):
            raise ValueError(f"the hook on {name} is {function!r:.40}; give a function of the module's output")
    if network.training and (network.graphed or any(getattr(block, "compiled", None) for block in network.blocks)):
        raise ValueError("hooks do not run in compiled training steps; put the network in evaluation mode first")
    with ExitStack() as stack:
        for name, function in functions.items():
            handle = modules[name].register_forward_hook(checked(name, function))
            stack.callback(handle.remove)
        yield


def checked(name: str, function: Hook) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
    """Return a forward hook that calls `function` and checks the tensor that `function` returns."""

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

    All other modules only contain modules, as ModuleList does, or contain weights that the network reads without
    calling the module.
    """
    uncalled = set[nn.Module]()
    if network.positions.is_biased():
        uncalled |= set(network.positions.modules())  # `positions.bias` reads their weights without calling them
    for block in network.blocks:
        if isinstance(block, Block) and isinstance(block.mixer, TTT):
            uncalled.add(block.mixer.heads_norm)  # TTT computes this norm itself, in the dtype of its state
    return {
        name: module
        for name, module in network.named_modules()
        if name and type(module).forward is not nn.Module.forward and module not in uncalled
    }


def unknown_module(network: DiT, name: object, called: Collection[str]) -> str:
    """Return an error message for a name that cannot be hooked.

    The message lists names that can be hooked in the same part of the network, or explains how to read a weight.

    Args:
        called: the names that can be hooked.
    """
    weights, modules = dict(network.named_parameters()), set(dict(network.named_modules())) - {""}
    if name in weights:
        return f"{name!r} is a weight, not a module; read it as network.get_parameter({name!r})"
    problem = "is not a module of this network"
    if name in modules:
        problem = "is never called itself, so a hook would not run"
        if not any(other.startswith(f"{name}.") for other in called):
            if not any(weight.startswith(f"{name}.") for weight in weights):
                return f"{name!r} {problem}: it has no weights, and the network calls its methods"
            return f"{name!r} {problem}: the network reads its weights; see network.get_submodule({name!r})"
    place = str(name)
    while place and not any(other.startswith(f"{place}.") for other in called):
        place = place.rpartition(".")[0]
    return f"{name!r} {problem}; {place or 'the network'} has {', '.join(parts_of(place, called))}"


def parts_of(place: str, names: Collection[str]) -> list[str]:
    """Return the outermost of the names inside the module `place`, or inside the network if `place` is empty.

    Numbered modules are summarised, as in `blocks.0 to blocks.11`.
    """
    inside = [name for name in names if name.startswith(f"{place}." if place else "")]
    outer = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    numbered: dict[str, list[str]] = {}
    for name in outer:
        numbered.setdefault(re.sub(r"\.\d+$", ".", name), []).append(name)
    return [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in numbered.values()]
