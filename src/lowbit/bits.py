"""The number system, once: kinds of codes, the sign convention, the bit order.

Everything that turns an integer code into bits or back goes through this module (and its one C++ twin,
`engine/src/codes.h`). `docs/OPS.md` says the same in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

KINDS: Final = ("bipolar", "signed", "unsigned", "table")

_BITS_OF_KIND: Final = {"bipolar": (1, 8), "signed": (2, 8), "unsigned": (1, 8), "table": (1, 4)}


@dataclass(frozen=True)
class Codes:
    """The type of a quantized tensor: which integers its `bits`-bit indices stand for.

    With index ``i = 0 .. 2**bits - 1`` the integer value is ::

        bipolar   c = 2 i - (2**bits - 1)        odd integers; 1 bit is {-1, +1}
        signed    c = i - 2**(bits - 1)          two's complement range
        unsigned  c = i - zero_point             zero_point is 0 but for pixels
        table     c = table[i]                   ascending, distinct, within -127..127

    `zero_point` holds one integer per channel and is empty where it is 0 everywhere.
    """

    kind: str
    bits: int
    table: tuple[int, ...] = ()
    zero_point: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind of codes {self.kind!r}; the kinds are {', '.join(KINDS)}")
        low, high = _BITS_OF_KIND[self.kind]
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not low <= self.bits <= high:
            raise ValueError(f"{self.kind} codes have {low} to {high} bits, not {self.bits!r}")
        if self.kind == "table":
            t = self.table
            if len(t) != 2**self.bits or any(a >= b for a, b in pairwise(t)):
                raise ValueError(f"a table of {self.bits}-bit codes needs {2**self.bits} ascending integers, got {t}")
            if t[0] < -127 or t[-1] > 127:
                raise ValueError(f"a table holds integers in -127..127, got {t}")
        elif self.table:
            raise ValueError(f"only table codes have a table, not {self.kind}")
        if self.zero_point:
            if self.kind != "unsigned" or self.bits != 8:
                raise ValueError("only 8-bit unsigned codes (pixels) have a zero point")
            if any(not 0 <= z <= 255 for z in self.zero_point):
                raise ValueError(f"a zero point is a pixel value in 0..255, got {self.zero_point}")

    @cached_property
    def values(self) -> NDArray[np.int16]:
        """The integer of every index, ascending, zero point left out. Shape ``(2**bits,)``."""
        i = np.arange(2**self.bits, dtype=np.int16)
        match self.kind:
            case "bipolar":
                return (2 * i - np.int16(2**self.bits - 1)).astype(np.int16)
            case "signed":
                return (i - np.int16(2 ** (self.bits - 1))).astype(np.int16)
            case "table":
                return np.array(self.table, dtype=np.int16)
        return i

    @property
    def low(self) -> int:
        """The smallest integer of this type, zero point taken in."""
        return int(self.values[0]) - max(self.zero_point, default=0)

    @property
    def high(self) -> int:
        """The largest integer of this type, zero point taken in."""
        return int(self.values[-1]) - min(self.zero_point, default=0)

    def check(self, code: NDArray[np.integer]) -> None:
        """Raises ValueError for an integer (zero point left out) outside the type."""
        if code.size == 0:
            return
        good = int(code.min()) >= self.values[0] and int(code.max()) <= self.values[-1]
        if good and self.kind == "bipolar":
            good = bool(np.bitwise_and.reduce(code, axis=None) & 1)  # all are odd
        elif good and self.kind == "table":
            good = bool(np.isin(code, self.values).all())
        if not good:
            raise ValueError(f"codes outside {self.bits}-bit {self.kind}")

    def index(self, code: NDArray[np.integer]) -> NDArray[np.uint8]:
        """The index of every integer code (zero point left out). Raises ValueError for an integer outside the type."""
        self.check(code)
        if self.kind == "table":
            return np.searchsorted(self.values, code).astype(np.uint8)
        return ((code - self.values[0]) >> (self.kind == "bipolar")).astype(np.uint8)


def pack(index: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack indices of `bits` bits densely: row-major, least significant bit first, only the last byte filled up with 0.

    Element n occupies the bits ``n * bits .. (n + 1) * bits - 1`` of the stream; bit b of the stream is bit ``b % 8``
    of byte ``b // 8``. Returns ``packed_size(index.size, bits)`` bytes.
    """
    flat = np.ascontiguousarray(index, dtype=np.uint8).reshape(-1, 1)
    planes = (flat >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.reshape(-1), bitorder="little")


def unpack(data: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    """The `size` indices of `bits` bits in `data`, as `pack` wrote them. Raises ValueError for a wrong length."""
    if data.size != packed_size(size, bits):
        raise ValueError(f"{size} codes of {bits} bits take {packed_size(size, bits)} bytes, not {data.size}")
    if bits == 8:
        return data
    stream = np.unpackbits(np.ascontiguousarray(data), count=size * bits, bitorder="little").reshape(size, bits)
    if bits == 1:
        return stream.reshape(size)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8)


def packed_size(size: int, bits: int) -> int:
    """Bytes that `size` codes of `bits` bits take, packed."""
    return (size * bits + 7) // 8
