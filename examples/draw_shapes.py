"""Draw a folder of images to try the examples on: circles, squares and triangles, 200 of each.

python examples/draw_shapes.py shapes
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw


def draw_shapes(folder: Path, per_class: int = 200) -> None:
    """One folder for each class below `folder`, which must not exist yet."""
    rng = random.Random(0)
    for name in ("circle", "square", "triangle"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.new("RGB", (40, 40), tuple(rng.randrange(90) for _ in range(3)))
            x, y, r = rng.randrange(15, 25), rng.randrange(15, 25), rng.randrange(10, 15)
            color, pen = tuple(rng.randrange(120, 256) for _ in range(3)), ImageDraw.Draw(image)
            corners = {"circle": 64, "square": 4, "triangle": 3}[name]
            pen.regular_polygon((x, y, r), corners, rotation=rng.randrange(-15, 16), fill=color)
            image.save(folder / name / f"{i:03}.png")


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "shapes")
    if place.name.startswith("-"):
        sys.exit(__doc__)
    if place.exists():
        sys.exit(f"{place} is there already; give another name")
    draw_shapes(place)
