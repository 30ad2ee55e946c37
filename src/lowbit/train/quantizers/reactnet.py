"""RSign: ReActNet's sign with a learned threshold per channel. Liu et al., ECCV 2020 (arXiv 2003.03488)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.train.quantizers.base import ACTIVATIONS
from lowbit.train.quantizers.sign import BinaryActivation, SignPolynomial


@ACTIVATIONS.register("reactnet")
class RSign(BinaryActivation):
    """q(x) = sign(x - beta_c) with a learned beta_c per input channel c, 0 at the start (2003.03488, RSign).

    Gradients, as in the authors' code: dq/dx = 2 - 2 |x - beta_c| for |x - beta_c| < 1, else 0 (that of Bi-Real net, 1808.00278),
    and dL/dbeta_c = -sum of dL/dx over the channel. That code learns -beta_c as a bias of the channel: the same numbers, but for
    x = beta_c, where it has 0 and everything here +1. The shifts take no weight decay (`parameter_groups`); in that code
    they have the weights' 1e-5 while only activations are binary, then none.

    Behind a flatten or before a linear layer every feature is a channel. In a Graph the shift is an `add` before `quantize`.
    ReActNet's weights are `bireal`; its RPReLU is a matter of the model.
    """

    beta: nn.Parameter

    def attach(self, channels: int) -> None:
        self.beta = nn.Parameter(torch.zeros(channels))

    def fake(self, x: Tensor) -> Tensor:
        out: Tensor = SignPolynomial.apply(self._shifted(x, self.beta))  # type: ignore[no-untyped-call]
        return out

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(self._shifted(x, self.beta.detach()))

    def _shifted(self, x: Tensor, beta: Tensor) -> Tensor:
        return x.float() - beta.view(-1, *[1] * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"bits=1, channels={self.beta.numel() if hasattr(self, 'beta') else None}"
