"""Starting from a trained network: ``train.start_from``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.train.layers import QuantLayer, quantized_layers
from lowbit.train.network import load_trained
from lowbit.train.quantizers.base import sign
from lowbit.train.rundir import read_checkpoint

__all__ = ["Start", "check_start", "read_start"]

_KEY = "train.start_from"


@dataclass(frozen=True)
class Start:
    """Where training starts: all weights, batch norms and PReLUs of a trained network of the same model, by name.

    Float weights and the real latent weights of a low-bit network go into the float model before it is prepared, so any method
    can start from them. The state of a layer's quantizers (and SLB's logits) goes into quantizers of the very same kind; others
    start as they always do.

    Attributes:
        place: what was given, for messages.
        state: the trained parameters and buffers by name.
        network: the trained network; None where there is but a state_dict of float weights.
    """

    place: str
    state: Mapping[str, Tensor] = field(repr=False)
    network: nn.Module | None = field(repr=False)

    def _layers(self) -> dict[str, QuantLayer]:
        return {} if self.network is None else dict(quantized_layers(self.network))

    def load_weights(self, model: nn.Module) -> None:
        """Fill the float model.

        Raises:
            ValueError: a tensor of the model is not there in its shape.
        """
        own = model.state_dict()
        logits = {f"{name}.weight" for name, layer in self._layers().items() if not layer.weight_quantizer.real_latent}
        wanted = [key for key in own if key not in logits]
        missing = [key for key in wanted if key not in self.state or self.state[key].shape != own[key].shape]
        if missing:
            raise ValueError(
                f"{_KEY}: {self.place} lacks {missing[0]!r} in the shape of this model ({len(missing)} missing)"
            )
        model.load_state_dict({key: self.state[key] for key in wanted}, strict=False)

    def load_quantizers(self, model: nn.Module) -> None:
        """Fill what `prepare` added.

        Raises:
            ValueError: a layer has logits in place of real weights, but other ones are wanted; a method that fine-tunes binary
                networks is given another one (`check_start`).
        """
        check_start(model, self)
        layers = dict(quantized_layers(model))
        for name, trained in self._layers().items():
            layer = layers.get(name)
            if layer is not None and _alike(layer.weight_quantizer, trained.weight_quantizer):
                _copy(layer.weight_quantizer, trained.weight_quantizer, name, self.place)
                layer.weight.data.copy_(trained.weight.data)
            elif not trained.weight_quantizer.real_latent:
                raise ValueError(
                    f"{_KEY}: {name}: the weights of {self.place} are logits of {_title(trained)}, and only the same method "
                    "with the same bits starts from them: start from a float network, or one of method sign"
                )
            if layer is not None and _alike(layer.input_quantizer, trained.input_quantizer):
                _copy(layer.input_quantizer, trained.input_quantizer, name, self.place)


def _title(layer: QuantLayer) -> str:
    bits = layer.weight_quantizer.bits
    return f"{type(layer.weight_quantizer).__name__} with {bits} bit{'s'[: bits > 1]}"


def _alike(one: nn.Module | None, other: nn.Module | None) -> bool:
    return one is not None and type(one) is type(other) and getattr(one, "bits", 0) == getattr(other, "bits", 0)


def _copy(into: nn.Module | None, trained: nn.Module | None, name: str, place: str) -> None:
    assert into is not None
    assert trained is not None
    try:
        into.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{_KEY}: {name}: {type(into).__name__} has other options in {place} ({str(error).splitlines()[-1].strip()})"
        ) from None


def check_start(model: nn.Module, start: Start | None) -> None:
    """Hold a start against what the model's methods need.

    A method with `binary_start` needs every layer of its own to come from one with 1-bit weights sign(W), W real.

    Raises:
        ValueError: another start, or none; it says what to do.
    """
    trained = {} if start is None else start._layers()
    for name, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        if not quantizer.binary_start:
            continue
        source = trained.get(name)
        if start is None:
            problem = "this recipe starts from nothing"
        elif source is None or source.weight_quantizer.bits == 32:
            problem = f"{name} of {start.place} is a float layer"
        elif _alike(quantizer, source.weight_quantizer):
            continue
        elif not source.weight_quantizer.real_latent or not _is_sign(source):
            problem = f"{name} of {start.place} is {_title(source)}: its codes are not the signs of real latent weights"
        else:
            continue
        raise ValueError(
            f"{type(quantizer).__name__} fine-tunes a binary network: train one with method sign or dorefa and give its run as "
            f"{_KEY} ({problem})"
        )


def _is_sign(layer: QuantLayer) -> bool:
    if layer.weight_quantizer.bits != 1:
        return False
    codes = layer.weight_quantizer.encode(layer.weight).codes
    return torch.equal(codes, sign(layer.weight.detach().float()))


def read_start(path: str | Path) -> Start:
    """The network to start from: a finished run, a checkpoint of one, or a file with a float network's ``state_dict``.

    Raises:
        RunError: it is not there, not finished or broken.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        tree = read_checkpoint(place, _KEY)
        if not {"recipe", "pytorch-lightning_version"} & tree.keys():
            return Start(str(place), tree["state_dict"], None)
    found = load_trained(place, _KEY)
    return Start(str(place), found.model.state_dict(), found.model)
