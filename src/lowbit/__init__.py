"""lowbit: train neural networks with 1- to 4-bit weights and activations, and run the same integers on a CPU.

>>> import lowbit
>>> net = lowbit.load("model.lowbit")      # needs numpy and safetensors, no torch
>>> logits = net(images_uint8)             # NumPy, (N, H, W, C)

Training lives in `lowbit.train` (the extra ``lowbit[train]``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from lowbit.bits import Codes
    from lowbit.graph import Graph, GraphError, Node, Tensor
    from lowbit.packfile import FileError, read, save
    from lowbit.runtime import Engine, load

_HOME = {
    "Codes": "lowbit.bits",
    "Engine": "lowbit.runtime",
    "FileError": "lowbit.packfile",
    "Graph": "lowbit.graph",
    "GraphError": "lowbit.graph",
    "Node": "lowbit.graph",
    "Tensor": "lowbit.graph",
    "load": "lowbit.runtime",
    "read": "lowbit.packfile",
    "save": "lowbit.packfile",
}

__all__ = [
    "Codes",
    "Engine",
    "FileError",
    "Graph",
    "GraphError",
    "Node",
    "Tensor",
    "__version__",
    "load",
    "read",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lowbit")
    if name not in _HOME:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
