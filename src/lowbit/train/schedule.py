"""What moves with the run: the temperature of SLB, the annealing of other methods."""

from __future__ import annotations

import math

from torch import nn

from lowbit.train.layers import quantized_layers

KINDS = ("exponential", "linear", "sine")


class Schedule:
    """Moves the inverse temperature T of every SLB layer from 1 to `growth` (SLB, 2009.08695).

    With u = (step / total_steps - start) / (end - start), clipped to 0..1::

        exponential   T = growth ** u
        linear        T = 1 + (growth - 1) u
        sine          T = 1 + (growth - 1) sin(pi u / 2)

    The published schedules multiply T by `speed` after every epoch between start and end; that is ``every="epoch"``,
    ``kind="exponential"``, ``growth = speed ** ((end - start) * epochs)``, see `published_growth`. Keep the total growth,
    not the speed, when epochs are fewer, and below about 30 epochs move T every step.

    Every quantizer is also told the part of the run that is done (`anneal`): AdaBin, IR-Net and ReCU go by it. A no-op for
    other networks.

    Args:
        model: a prepared network.
        total_steps: steps (or epochs, with ``every="epoch"``) of the whole run.
        every: what the caller counts: "step" or "epoch". Only a label: call `step` that often.
        growth: T at the end.
        kind: "exponential", "linear" or "sine".
        start, end: the part of the run over which T grows, as fractions.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        every: str = "step",
        growth: float = 1000.0,
        kind: str = "exponential",
        start: float = 0.0,
        end: float = 0.9,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
        if every not in ("step", "epoch"):
            raise ValueError(f"every is 'step' or 'epoch', not {every!r}")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {total_steps!r}")
        if not growth >= 1:
            raise ValueError(f"growth must be at least 1, not {growth!r}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start and end must keep 0 <= start < end <= 1, not {start!r} and {end!r}")
        self.every, self.kind, self.growth = every, kind, float(growth)
        self.total_steps, self.start, self.end = total_steps, start, end
        layers = [layer for _, layer in quantized_layers(model)]
        self._quantizers = [
            q for layer in layers for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None
        ]
        self._warm = [layer.weight_quantizer for layer in layers if hasattr(layer.weight_quantizer, "temperature")]

    def temperature(self, step: int) -> float:
        """T at `step` (0 .. total_steps)."""
        u = (step / self.total_steps - self.start) / (self.end - self.start)
        u = min(max(u, 0.0), 1.0)
        match self.kind:
            case "exponential":
                return self.growth**u
            case "linear":
                return 1 + (self.growth - 1) * u
        return 1 + (self.growth - 1) * math.sin(math.pi * u / 2)

    def step(self, step: int) -> float:
        """Set T for `step` and tell every quantizer how far the run is; return T."""
        t = self.temperature(step)
        for quantizer in self._warm:
            quantizer.temperature.fill_(t)  # type: ignore[operator]
        for each in self._quantizers:
            each.anneal(min(max(step / self.total_steps, 0.0), 1.0))
        return t


def published_growth(speed: float, epochs: int, start: float, end: float) -> float:
    """Total growth of a schedule that multiplies T by `speed` every epoch from start*epochs to end*epochs."""
    return float(speed ** ((end - start) * epochs))
