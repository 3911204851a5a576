"""Pictures like stained blood cells, drawn by formula: a data set that needs no download.

Drawn from general knowledge of what stained cells look like; no real image was read, and results
on them say nothing about medicine. A class is a combination of nucleus (round, kidney, lobed),
cytoplasm (rose, blue) and texture (smooth, granular). Every pair of these cues is shared by two
classes somewhere, so a network must see colour, shape and texture together, as with real cells.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.datasets.base import Dataset, ImageSet, IntArray, UInt8Array
from common.errors import DataError

FloatArray = NDArray[np.float32]

_ROUND, _KIDNEY, _LOBED = 0, 1, 2
_ROSE, _BLUE = 0, 1
_SMOOTH, _GRANULAR = 0, 1

# (name, nucleus, cytoplasm, texture, share of the images)
_CLASSES = (
    ("lobed blue granular", _LOBED, _BLUE, _GRANULAR, 0.10),
    ("lobed rose granular", _LOBED, _ROSE, _GRANULAR, 0.15),
    ("round rose smooth", _ROUND, _ROSE, _SMOOTH, 0.11),
    ("kidney blue granular", _KIDNEY, _BLUE, _GRANULAR, 0.14),
    ("round blue smooth", _ROUND, _BLUE, _SMOOTH, 0.10),
    ("kidney blue smooth", _KIDNEY, _BLUE, _SMOOTH, 0.11),
    ("lobed rose smooth", _LOBED, _ROSE, _SMOOTH, 0.16),
    ("round rose granular", _ROUND, _ROSE, _GRANULAR, 0.13),
)
CLASS_NAMES: tuple[str, ...] = tuple(entry[0] for entry in _CLASSES)

# Discs that make up a nucleus: (angle in degrees, distance from its centre, radius), in units of
# the cell's radius. As in blood, a round nucleus fills most of its cell and lobes are small.
_NUCLEI = (
    ((0, 0.00, 0.57),) * 5,
    ((-112, 0.42, 0.25), (-56, 0.42, 0.28), (0, 0.42, 0.29), (56, 0.42, 0.28), (112, 0.42, 0.25)),
    ((0, 0.48, 0.24), (120, 0.48, 0.24), (240, 0.48, 0.24), (60, 0.26, 0.07), (180, 0.26, 0.07)),
)
_CYTOPLASM = ((238, 178, 188), (164, 186, 230))
_NUCLEUS = ((112, 58, 142),)
_BACKGROUND = (236, 224, 222)
_RED_CELL = (226, 164, 158)
_GRANULES = 24
_RED_CELLS = 4
_CHUNK = 256
MIN_SIZE = 96


def make_synthetic(size: int = 6000, *, image_size: int = 28, seed: int = 0) -> Dataset:
    """Draw ``size`` images in all, split 75 % / 8.3 % / 16.7 % (6000: 4500, 500 and 1000).

    RGB, eight classes with a mild imbalance that is the same in each split. The same arguments
    give the same images. Raises :class:`DataError` for a size below ``MIN_SIZE`` (each split
    must hold every class) or an image size below 12, where no texture is left to see.
    """
    if size < MIN_SIZE:
        raise DataError(
            f"synthetic-size is {size}; eight classes in three splits need {MIN_SIZE}.",
            f"Set synthetic-size to {MIN_SIZE} or more.",
        )
    sizes = (size - round(size / 12) - round(size / 6), round(size / 12), round(size / 6))
    streams = np.random.SeedSequence(seed % 2**64).spawn(3)
    sets = []
    for count, stream in zip(sizes, streams, strict=True):
        rng = np.random.default_rng(stream)
        labels = rng.permutation(np.repeat(np.arange(len(_CLASSES)), _class_sizes(count)))
        sets.append(ImageSet(make_images(labels, image_size=image_size, rng=rng), labels))
    digest = hashlib.sha256()
    for part in sets:
        digest.update(part.images.tobytes())
        digest.update(part.labels.astype("<i8").tobytes())
    return Dataset(
        name="synthetic",
        source="built-in synthetic cells (no real image)",
        sha256=digest.hexdigest(),
        class_names=CLASS_NAMES,
        train=sets[0],
        val=sets[1],
        test=sets[2],
        notes=(f"drawn by formula with seed {seed}; results say nothing about real cells",),
    )


def _class_sizes(count: int) -> IntArray:
    """Share ``count`` out by the classes' weights, by largest remainder, one each at least."""
    exact = np.array([entry[4] for entry in _CLASSES]) * count
    sizes: IntArray = np.maximum(np.floor(exact), 1).astype(np.int64)
    for label in np.argsort(sizes - exact, kind="stable")[: max(0, count - int(sizes.sum()))]:
        sizes[label] += 1
    while sizes.sum() > count:
        sizes[np.argmax(sizes)] -= 1
    return sizes


def make_images(labels: IntArray, *, image_size: int = 28, rng: np.random.Generator) -> UInt8Array:
    """Draw one image for each label: uint8 (N, image_size, image_size, 3)."""
    if image_size < 12:
        raise DataError(f"image-size is {image_size}.", "Synthetic cells need 12 pixels or more.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(_CLASSES):
        raise DataError("A label has no synthetic class.", f"Use 0 to {len(_CLASSES) - 1}.")
    images = np.empty((len(labels), image_size, image_size, 3), dtype=np.uint8)
    for start in range(0, len(labels), _CHUNK):
        part = labels[start : start + _CHUNK]
        images[start : start + len(part)] = _draw(part, image_size, rng)
    return images


# Drawing uses +, -, *, /, square root, minimum and maximum only: IEEE arithmetic gives the same
# bits for those on every processor, and so the same digest for a seed.


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> FloatArray:
    return (low + (high - low) * rng.random(shape)).astype(np.float32)


def _step(x: Any, width: float) -> FloatArray:
    """Return 1 where x is below 0, 0 above ``width``, and a smooth slope between."""
    t: FloatArray = np.clip(1 - x / np.float32(width), 0, 1).astype(np.float32)
    return t * t * (3 - 2 * t)


def _turned(rng: np.random.Generator, n: int) -> tuple[FloatArray, FloatArray]:
    """Return cosine and sine (n,) of random angles, rounded so that libraries agree on them."""
    angle = rng.random(n) * (2 * np.pi)
    return np.round(np.cos(angle), 6).astype(np.float32), np.round(np.sin(angle), 6).astype(
        np.float32
    )


def _smooth_noise(rng: np.random.Generator, n: int, size: int, cells: int) -> FloatArray:
    """Return (n, size, size) in [-1, 1]: random values on a coarse grid, bilinear between."""
    grid = _uniform(rng, -1, 1, n, cells + 1, cells + 1)
    at = np.linspace(0, cells, size, endpoint=False)
    low = at.astype(np.int64)
    t = (at - low).astype(np.float32)
    rows = grid[:, low] * (1 - t)[:, None] + grid[:, low + 1] * t[:, None]
    blended = rows[:, :, low] * (1 - t) + rows[:, :, low + 1] * t
    return blended.astype(np.float32, copy=False)


def _blend(canvas: FloatArray, colour: FloatArray, mask: FloatArray) -> None:
    """Lay ``colour`` (n, 3) over ``canvas`` (n, s, s, 3) where ``mask`` (n, s, s) is 1."""
    canvas += (colour[:, None, None, :] - canvas) * mask[..., None]


def _tint(rng: np.random.Generator, colours: Any, spread: float) -> FloatArray:
    base = np.asarray(colours, dtype=np.float32)
    return base + _uniform(rng, -spread, spread, *base.shape)


def _draw(labels: IntArray, size: int, rng: np.random.Generator) -> UInt8Array:
    """Draw a chunk of cells, all at once. Coordinates run from -1 to 1 over the image."""
    n = len(labels)
    kind = np.array([entry[1:4] for entry in _CLASSES])[labels]
    axis: FloatArray = ((np.arange(size) * 2 + 1) / size - 1).astype(np.float32)
    y, x = axis[None, :, None], axis[None, None, :]
    soft = 2.5 / size  # an edge is a good pixel wide

    canvas = np.empty((n, size, size, 3), dtype=np.float32)
    canvas[...] = _tint(rng, [_BACKGROUND] * n, 6)[:, None, None, :]
    _red_cells(canvas, x, y, soft, rng)

    cx, cy = _uniform(rng, -0.16, 0.16, n, 1, 1), _uniform(rng, -0.16, 0.16, n, 1, 1)
    radius = _uniform(rng, 0.62, 0.78, n, 1, 1)
    cos, sin = (turned[:, None, None] for turned in _turned(rng, n))
    # The cell's own frame: moved, turned, scaled, and a little longer than wide.
    stretch = _uniform(rng, 0.92, 1.08, n, 1, 1)
    u = (((x - cx) * cos + (y - cy) * sin) / radius * stretch).astype(np.float32, copy=False)
    v = (((y - cy) * cos - (x - cx) * sin) / radius / stretch).astype(np.float32, copy=False)
    wobble = _smooth_noise(rng, n, size, 5)
    cell = _step(np.sqrt(u * u + v * v) - 1 + 0.09 * wobble, soft / 0.7)
    nucleus = _nucleus(kind[:, 0], u, v, soft / 0.7, rng) * cell

    cytoplasm = _tint(rng, np.array(_CYTOPLASM)[kind[:, 1]], 9)
    _blend(canvas, cytoplasm, cell)
    canvas += (cell * _smooth_noise(rng, n, size, 6) * 5)[..., None]
    dark = _tint(rng, np.array(_NUCLEUS * n), 10)
    _blend(canvas, dark, nucleus * 0.93)
    canvas += (nucleus * _smooth_noise(rng, n, size, 9) * 16)[..., None]
    _granules(canvas, cell * (1 - 0.6 * nucleus), kind[:, 2], u, v, rng)

    light = _uniform(rng, 0.93, 1.05, n, 1, 1, 1) * _uniform(rng, 0.98, 1.02, n, 1, 1, 3)
    noise = rng.random((n, size, size, 3), dtype=np.float32) - np.float32(0.5)
    finished = np.clip(canvas * light + noise * 12 + np.float32(0.5), 0, 255)
    pixels: UInt8Array = finished.astype(np.uint8)
    return pixels


def _red_cells(
    canvas: FloatArray, x: FloatArray, y: FloatArray, soft: float, rng: np.random.Generator
) -> None:
    """Draw red cells around the border: pale in the middle, no use for telling classes apart."""
    n = len(canvas)
    for _ in range(_RED_CELLS):
        cos, sin = _turned(rng, n)
        far = _uniform(rng, 0.95, 1.4, n)
        radius = _uniform(rng, 0.36, 0.48, n, 1, 1)
        dx, dy = x - (cos * far)[:, None, None], y - (sin * far)[:, None, None]
        away = np.sqrt(dx * dx + dy * dy) / radius
        mask = _step(away - 1, soft / 0.4) * (1 - 0.45 * _step(away - 0.15, 0.5))
        _blend(canvas, _tint(rng, [_RED_CELL] * n, 8), mask)


def _nucleus(
    shape: IntArray, u: FloatArray, v: FloatArray, soft: float, rng: np.random.Generator
) -> FloatArray:
    """Return the mask (n, s, s) of the nuclei: the union of the shape's discs."""
    n = len(shape)
    table = np.array(_NUCLEI, dtype=np.float32)
    turn = table[..., 0] * np.float32(np.pi / 180)
    ox = np.round(np.cos(turn) * table[..., 1], 6)[shape]
    oy = np.round(np.sin(turn) * table[..., 1], 6)[shape]
    grown = _uniform(rng, 0.92, 1.08, n, 1)
    inside = np.full(u.shape, 9, dtype=np.float32)
    # A kidney's arc is centred on its opening: move it so that its mass is in the middle.
    back = np.where(shape == _KIDNEY, np.float32(0.13), np.float32(0))
    for disc in range(table.shape[1]):
        jitter = _uniform(rng, -0.03, 0.03, 2, n)
        dx = u - (ox[:, disc] - back + jitter[0])[:, None, None]
        dy = v - (oy[:, disc] + jitter[1])[:, None, None]
        away = (
            np.sqrt(dx * dx + dy * dy)
            - (table[..., 2][shape][:, disc] * grown[:, 0])[:, None, None]
        )
        inside = np.minimum(inside, away)
    return _step(inside, soft)


def _granules(
    canvas: FloatArray,
    where: FloatArray,
    texture: IntArray,
    u: FloatArray,
    v: FloatArray,
    rng: np.random.Generator,
) -> None:
    """Sprinkle dark granules ``where`` the cytoplasm of the granular cells is.

    What the granules darken, the rest of the cell gains: the mean colour stays, and only
    texture tells a granular cell from a smooth one.
    """
    chosen = np.flatnonzero(texture == _GRANULAR)
    uu, vv = u[chosen], v[chosen]
    dots = np.zeros(uu.shape, dtype=np.float32)
    for _ in range(_GRANULES):
        cos, sin = _turned(rng, len(chosen))
        far = np.sqrt(_uniform(rng, 0.04, 0.9, len(chosen)))
        radius = _uniform(rng, 0.13, 0.17, len(chosen), 1, 1)
        dx, dy = uu - (cos * far)[:, None, None], vv - (sin * far)[:, None, None]
        bump = np.clip(1 - (dx * dx + dy * dy) / (radius * radius), 0, 1)
        dots = np.maximum(dots, bump)
    lift = np.float32(0.2)
    depth = _uniform(rng, 100, 125, len(chosen), 1, 1)
    change = (where[chosen] * depth * (lift - dots))[..., None]
    canvas[chosen] += change * np.array([0.9, 1.1, 0.7], dtype=np.float32)
