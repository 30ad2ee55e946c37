"""The number system: kinds, indices, bit order."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.bits import Codes, pack, packed_size, unpack

KINDS = (
    [("bipolar", b) for b in range(1, 9)]
    + [("signed", b) for b in range(2, 9)]
    + [("unsigned", b) for b in range(1, 9)]
)


def test_one_bit_is_minus_one_and_plus_one() -> None:
    assert Codes("bipolar", 1).values.tolist() == [-1, 1]
    assert Codes("bipolar", 2).values.tolist() == [-3, -1, 1, 3]
    assert Codes("signed", 2).values.tolist() == [-2, -1, 0, 1]
    assert Codes("unsigned", 2).values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_index_inverts_values(kind: str, bits: int) -> None:
    codes = Codes(kind, bits)
    assert codes.index(codes.values).tolist() == list(range(2**bits))
    assert (codes.low, codes.high) == (codes.values[0], codes.values[-1])
    with pytest.raises(ValueError, match="codes outside"):
        codes.index(np.array([codes.high + 1], np.int16))
    with pytest.raises(ValueError, match="codes outside"):
        codes.index(np.array([codes.low - 1], np.int16))


def test_even_integers_are_not_bipolar() -> None:
    with pytest.raises(ValueError, match="codes outside"):
        Codes("bipolar", 2).index(np.array([0], np.int16))


def test_bit_order_is_least_significant_first() -> None:
    assert pack(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], np.uint8), 1).tolist() == [1, 1]
    assert pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist() == [0b00111001]
    # 3-bit codes cross the byte: 5 = 101, 6 = 110, 7 = 111 -> stream 101 011 111 (least significant first)
    assert pack(np.array([5, 6, 7], np.uint8), 3).tolist() == [0b11110101, 0b1]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
def test_unpack_inverts_pack(bits: int, size: int) -> None:
    index = np.random.default_rng(bits * 1009 + size).integers(0, 2**bits, size).astype(np.uint8)
    packed = pack(index, bits)
    assert packed.size == packed_size(size, bits)
    assert unpack(packed, bits, size).tolist() == index.tolist()


def test_unpack_refuses_a_wrong_length() -> None:
    with pytest.raises(ValueError, match="take 2 bytes, not 1"):
        unpack(np.zeros(1, np.uint8), 1, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ternary", 2), "unknown kind"),
        (("bipolar", 0), "1 to 8 bits"),
        (("signed", 1), "2 to 8 bits"),
        (("unsigned", True), "1 to 8 bits"),
        (("table", 2, (1, 2, 3)), "4 ascending integers"),
        (("table", 1, (2, 1)), "ascending"),
        (("table", 1, (-128, 1)), "-127..127"),
        (("bipolar", 1, (0, 1)), "only table codes"),
        (("unsigned", 4, (), (3,)), "zero point"),
        (("unsigned", 8, (), (256,)), "0..255"),
    ],
)
def test_impossible_codes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codes(*arguments)
