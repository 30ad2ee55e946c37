"""What a quantizer is: it says what it computes in training (`fake`) and which integers that stands for (`encode`).

`lowbit.train.freeze` asks nothing else of it, and a contract test walks the registries and holds, for every quantizer, ::

    fake(x) == decode(encode(x))        exactly, once it is sharpened (`sharpen`; only SLB has anything to sharpen)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.bits import Codes
from lowbit.train.registry import Registry

WEIGHTS: Registry[type[WeightQuantizer]] = Registry(
    "weight quantizer",
    {
        "adabin": "lowbit.train.quantizers.adabin",
        "bireal": "lowbit.train.quantizers.bireal",
        "dorefa": "lowbit.train.quantizers.dorefa",
        "float": "lowbit.train.quantizers.float",
        "int8": "lowbit.train.quantizers.int8",
        "irnet": "lowbit.train.quantizers.irnet",
        "lns": "lowbit.train.quantizers.lns",
        "lsq": "lowbit.train.quantizers.lsq",
        "recu": "lowbit.train.quantizers.recu",
        "sign": "lowbit.train.quantizers.sign",
        "slb": "lowbit.train.quantizers.slb",
        "xnor": "lowbit.train.quantizers.xnor",
    },
)
"""Weight quantizers by the name that `prepare(method=...)` takes."""

ACTIVATIONS: Registry[type[ActivationQuantizer]] = Registry(
    "activation quantizer",
    {
        "adabin": "lowbit.train.quantizers.adabin",
        "dorefa": "lowbit.train.quantizers.dorefa",
        "int8": "lowbit.train.quantizers.int8",
        "irnet": "lowbit.train.quantizers.irnet",
        "lsq": "lowbit.train.quantizers.lsq",
        "pact": "lowbit.train.quantizers.pact",
        "reactnet": "lowbit.train.quantizers.reactnet",
        "sign": "lowbit.train.quantizers.sign",
    },
)
"""Activation quantizers by the name that `prepare(activation=...)` takes."""


class QuantizerWarning(UserWarning):
    """Settings that a method runs with, but that its paper advises against. A training run keeps it in ``run.json``."""


@dataclass(frozen=True)
class Encoded:
    """Quantized numbers: ``value = scale * code + offset``.

    `codes` is a float32 tensor of integers, whose type the quantizer tells (float weights stand for themselves);
    `scale` and `offset` are float32: one number or one per output channel. Most methods have no offset (None).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def decode(self) -> Tensor:
        """scale * code, then + offset where there is one, each rounded to float32."""
        value = self.codes * per_channel(self.scale, self.codes)
        return value if self.offset is None else value + per_channel(self.offset, self.codes)


class WeightQuantizer(nn.Module):
    """Base of the weight quantizers. The layer owns the trainable `latent`; the quantizer interprets it.

    Attributes:
        allowed_bits: the weight bits the method has.
        decayed: names of the quantizer's own parameters that take the weight decay of ordinary weights; others take none.
        real_latent: `latent` are real weights of the weights' own shape, which a network of another such method can start from.
        binary_start: the method fine-tunes: the trainer refuses it without a trained network of 1-bit weights to start from.

    Args:
        bits: weight bits K.

    Raises:
        ValueError: the method has no such number of bits.
    """

    allowed_bits: ClassVar[tuple[int, ...]] = ()
    decayed: ClassVar[tuple[str, ...]] = ()
    real_latent: ClassVar[bool] = True
    binary_start: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        _check_bits(type(self), bits, WEIGHTS, "method", "weight")
        self.bits = bits

    @property
    def code_type(self) -> Codes | None:
        """Kind and bits of the codes; None for float weights."""
        raise NotImplementedError

    def attach(self, weight: Tensor) -> None:
        """Called once, before `latent`, with the float weights: creates what depends on their shape. Nothing for most methods."""

    def latent(self, weight: Tensor) -> Tensor:
        """The trainable tensor to start from, given float weights of shape [O, ...]."""
        return weight.detach().clone()

    def fake(self, latent: Tensor) -> Tensor:
        """The weight used in training, float32, shape [O, ...], differentiable in `latent`."""
        raise NotImplementedError

    def encode(self, latent: Tensor) -> Encoded:
        """The integers that the network runs with."""
        raise NotImplementedError

    def mapping_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of a network of the quantizer's own, which can be warmed up alone. None for most methods."""
        return iter(())

    def auxiliary_loss(self, latent: Tensor) -> Tensor | None:  # noqa: ARG002
        """A term for the training loss, or None."""
        return None

    def anneal(self, progress: float) -> None:
        """Called by `Schedule` before a step with the part of the run that is done, 0..1. Nothing for most methods."""

    def sharpen(self) -> None:
        """Go to the end of the method's annealing, where `fake` equals the hard weights. Nothing for most methods."""

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class ActivationQuantizer(nn.Module):
    """Base of the activation quantizers.

    Args:
        bits: activation bits B.

    Attributes:
        allowed_bits: the B that the method has.
        decayed: names of the quantizer's own parameters that take the weight decay of ordinary weights; others take none.

    Raises:
        ValueError: the method has no such number of bits.
    """

    allowed_bits: ClassVar[tuple[int, ...]] = ()
    decayed: ClassVar[tuple[str, ...]] = ()
    zero_point: Tensor | None

    def __init__(self, bits: int) -> None:
        super().__init__()
        _check_bits(type(self), bits, ACTIVATIONS, "activation", "activation")
        self.bits = bits
        self.register_buffer("zero_point", None, persistent=False)  # only pixels have one: a number per channel

    def attach(self, channels: int) -> None:
        """Called once with the number of input channels: creates what there is one of per channel. Nothing for most methods."""

    def anneal(self, progress: float) -> None:
        """Called by `Schedule` before a step with the part of the run that is done, 0..1. Nothing for most methods."""

    @property
    def code_type(self) -> Codes:
        """Kind and bits of the codes."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """The step: value = scale * code + offset; a float32 scalar."""
        raise NotImplementedError

    @property
    def offset(self) -> Tensor | None:
        """What is added to scale * code; a float32 scalar, None for most methods. A padded position stays 0, not offset."""
        return None

    @property
    def reciprocal(self) -> Tensor | None:
        """What x is multiplied with before rounding; a float32 scalar. None for 1-bit codes (sign) and pixels."""
        return None

    def fake(self, x: Tensor) -> Tensor:
        """The activation used in training, differentiable."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.fake(x)

    def encode(self, x: Tensor) -> Tensor:
        """The integer codes of x, held in float32."""
        codes = self.code_type
        out: Tensor = torch.ops.lowbit.quantize(x, self.reciprocal, self.zero_point, codes.low, codes.high)
        return out

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _check_bits(
    quantizer: type[WeightQuantizer] | type[ActivationQuantizer],
    bits: int,
    registry: Registry[Any],
    kind: str,
    what: str,
) -> None:
    allowed = quantizer.allowed_bits
    if type(bits) is int and bits in allowed:
        return
    name = registry.name_of(quantizer) or quantizer.__name__
    others = [n for n in registry if bits in registry.get(n).allowed_bits]
    numbers = ", ".join(map(str, allowed))
    raise ValueError(
        f"the {kind} {name!r} has {numbers} {what} bit{'s' * (allowed != (1,))}, not {bits!r}: {kind}s with {bits!r} {what} "
        f"bit{'s' * (bits != 1)} are {', '.join(others) or 'not to be had'}"
    )


def per_channel(x: Tensor, like: Tensor) -> Tensor:
    """One number per output channel, [O], in the shape in which it broadcasts over weights [O, ...]; scalars stay."""
    return x.view(-1, *[1] * (like.ndim - 1)) if x.ndim == 1 else x


def magnitude(weight: Tensor) -> Tensor:
    """mean |W_o| per output channel o, shape [O], without a gradient: the scale that is nearest to W_o with sign(W_o)
    (XNOR-Net, 1603.05279)."""
    return weight.detach().float().abs().mean(dim=tuple(range(1, weight.ndim)))


def sign(x: Tensor) -> Tensor:
    """sign(x) = +1 unless x < 0: sign(0) = sign(-0.0) = +1."""
    # torch.sign gives 0 for both zeros, which + 0.5 lifts; twice as fast on CPU as copysign(1, x + 0.0), 20 times as where
    return torch.sign(x).add_(0.5).sign_()


def quantize(x: Tensor, reciprocal: Tensor, low: int, high: int) -> Tensor:
    """clamp(rint(x * reciprocal), low, high), ties to even: the op `quantize` of docs/OPS.md for 2 bits and more."""
    return torch.clamp(torch.round(x * reciprocal), low, high)


@torch.library.custom_op("lowbit::quantize", mutates_args=())
def _encode(x: Tensor, reciprocal: Tensor | None, zero_point: Tensor | None, low: int, high: int) -> Tensor:
    # One node in an exported graph. Pixels have a zero point, 1-bit codes no reciprocal.
    x = x.float()
    if zero_point is not None:
        return x - zero_point.view(-1, *[1] * (x.ndim - 2))
    return sign(x) if reciprocal is None else quantize(x, reciprocal, low, high)


@_encode.register_fake
def _(x: Tensor, reciprocal: Tensor | None, zero_point: Tensor | None, low: int, high: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x, dtype=torch.float32)


class _RoundSTE(torch.autograd.Function):
    """rint forward, identity backward (straight-through estimator; Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        return grad


def round_ste(x: Tensor) -> Tensor:
    """round(x), ties to even, with the gradient of the identity."""
    out: Tensor = _RoundSTE.apply(x)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, hard: Tensor) -> Tensor:  # noqa: ARG004
        return hard.view_as(hard)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def straight_through(latent: Tensor, hard: Tensor) -> Tensor:
    """`hard`, to the last bit, with the gradient of the identity to `latent` (straight-through estimator)."""
    out: Tensor = _StraightThrough.apply(latent.float(), hard)  # type: ignore[no-untyped-call]
    return out


class _UniformSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reciprocal: Tensor, scale: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.codes = codes
        return quantize(x, reciprocal, codes.low, codes.high) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        inside = (x >= ctx.codes.low * scale) & (x <= ctx.codes.high * scale)
        return grad * inside, None, None, None  # 3x faster than where(inside, grad, 0)


def uniform_ste(x: Tensor, reciprocal: Tensor, scale: Tensor, codes: Codes) -> Tensor:
    """clamp(rint(x * reciprocal), low, high) * scale; gradient 1 between the ends of the range, 0 outside."""
    out: Tensor = _UniformSTE.apply(x.float(), reciprocal, scale, codes)  # type: ignore[no-untyped-call]
    return out
