"""Draw boot.png, a picture as Fashion-MNIST has them (28 x 28, light on black), for the first example of the README.

Run: python examples/draw_boot.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

LARGE = 16
"""Drawn so many times as large, then averaged."""
UPPER = ((17, 4), (26, 4.5), (25.6, 12), (26.4, 20.5), (1.5, 20.5), (1.8, 18.2), (8.5, 15.2), (14.5, 11.8))
GORE = ((19.2, 4.3), (23.4, 4.5), (22.8, 12.5), (20.2, 12.2))  # the elastic of a Chelsea boot
SOLE = ((1, 20.5), (26.6, 20.5), (26.6, 23.6), (20.4, 23.6), (19.8, 21.9), (2, 21.9))


def boot() -> Image.Image:
    """A Chelsea boot, its toe to the left."""
    image = Image.new("L", (28 * LARGE, 28 * LARGE))
    draw = ImageDraw.Draw(image)
    for outline, shade in ((UPPER, 205), (GORE, 150), (SOLE, 120)):
        draw.polygon([(x * LARGE, y * LARGE) for x, y in outline], fill=shade)
    return image.resize((28, 28), Image.Resampling.BOX)


if __name__ == "__main__":
    boot().save(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("boot.png"))
