"""RSign: ReActNet's sign with a learned threshold per channel. Liu et al., ECCV 2020 (arXiv 2003.03488)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.train.quantizers.base import ACTIVATIONS
from lowbit.train.quantizers.sign import BinaryActivation, SignPolynomial


@ACTIVATIONS.register("reactnet")
class RSign(BinaryActivation):
    """q(x) = sign(x - beta_c) with a learned beta_c per input channel c, 0 at the start (2003.03488, section 4.2, RSign).

    Gradients: dq/dx = 2 - 2 |x - beta_c| for |x - beta_c| < 1, else 0 (Bi-Real net, 1808.00278, equation 8), and
    dL/dbeta_c = -sum of dL/dx over the channel. The paper has -1 at x = beta_c; as everywhere here it is +1. The authors' code
    learns -beta_c as the bias of the channel: the same numbers. The shifts take no weight decay (`parameter_groups`).

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
