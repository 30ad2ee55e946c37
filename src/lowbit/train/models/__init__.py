"""Networks, by name: plain nn.Modules that go through the same door (``prepare``) as anybody's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lowbit.train.registry import Registry, nearest

__all__ = ["MODELS", "build_model", "model_arguments", "model_factory"]

#: ``name -> function(classes, in_channels, image_size, **arguments) -> nn.Module``, for super-resolution ``function(upscale,
#: **arguments)``. One file, one line for each.
MODELS: Registry[Callable[..., nn.Module]] = Registry(
    "model",
    {
        "alexnet": "lowbit.train.models.alexnet",
        "bireal_resnet14": "lowbit.train.models.bireal",
        "bireal_resnet18": "lowbit.train.models.bireal",
        "bireal_resnet34": "lowbit.train.models.bireal",
        "bireal_sr": "lowbit.train.models.superres",
        "linear_sr": "lowbit.train.models.superres",
        "reactnet18": "lowbit.train.models.reactnet",
        "reactnet_a": "lowbit.train.models.reactnet",
        "resnet18": "lowbit.train.models.resnet",
        "resnet20": "lowbit.train.models.resnet_cifar",
        "resnet34": "lowbit.train.models.resnet",
        "vdsr": "lowbit.train.models.superres",
        "vgg_small": "lowbit.train.models.vgg_small",
    },
)

_FROM_DATA = ("classes", "in_channels", "image_size", "upscale")


def model_factory(name: str) -> Callable[..., nn.Module]:
    """A registered model, or ``package.module:function``: anybody's own.

    Raises:
        ValueError: no such model, or it can't be imported.
    """
    if ":" not in name:
        return MODELS.get(name)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} can't be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"model {name!r} is not a class or function")
    return found


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments a recipe may give to model ``name``, with their defaults.

    Raises:
        ValueError: no such model.
    """
    parameters = inspect.signature(model_factory(name)).parameters
    return {key: p.default for key, p in parameters.items() if key not in _FROM_DATA}


def build_model(
    name: str, *, classes: int, in_channels: int, image_size: int, upscale: int = 1, **arguments: Any
) -> nn.Module:
    """Build model ``name`` in float32, randomly initialised.

    Args:
        name: a registered name, or ``package.module:function`` for your own. Of ``classes``, ``in_channels``,
            ``image_size`` and ``upscale`` your function gets those it has arguments for.
        classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images.
        upscale: how many times larger the output is than the input; 1 but for super-resolution.
        **arguments: the model's own arguments.

    Raises:
        ValueError: no such model, it has no such argument, or it is no nn.Module.
    """
    factory = model_factory(name)
    known = model_arguments(name)
    for key in arguments:
        if key not in known:
            raise ValueError(f"model {name!r} has no argument {key!r}: {nearest(key, list(known))}")
    given = {"classes": classes, "in_channels": in_channels, "image_size": image_size, "upscale": upscale}
    takes = inspect.signature(factory).parameters
    model = factory(**{key: value for key, value in given.items() if key in takes}, **arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, not an nn.Module")
    return model
