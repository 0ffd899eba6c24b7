"""A small set of photos with label maps: squares and discs of two colours on grey, and unlabelled edges."""

import numpy as np
import PIL.Image

CLASSES = 3  # background, square, disc


def write(folder, count=12, size=(72, 96), split="train", seed=0):
    """Writes SPLIT/images and SPLIT/masks, with 255 for "not labelled"; returns the folder."""
    rng = np.random.default_rng([seed, len(split)])
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    for name in ("images", "masks"):
        (folder / split / name).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        image = rng.integers(90, 130, (*size, 3))
        for value, colour in ((1, (220, 40, 40)), (2, (40, 60, 220))):
            y, x = rng.integers(20, height - 20), rng.integers(20, width - 20)
            distance = (rows - y) ** 2 + (columns - x) ** 2 if value == 2 else None
            inside = distance < 200 if value == 2 else np.maximum(abs(rows - y), abs(columns - x)) < 13
            mask[inside], image[inside] = value, colour
        mask[:3] = 255
        PIL.Image.fromarray(image.astype(np.uint8)).save(folder / split / "images" / f"{number:03d}.png")
        PIL.Image.fromarray(mask).save(folder / split / "masks" / f"{number:03d}.png")
    return folder
