"""The data set that needs no download: coloured shapes, drawn from a seed."""

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.run import distributed

SIZE = 32  # pixels, both ways
OVERSAMPLING = 4  # a shape is drawn this much larger and averaged down, which smooths its edges
GROUND = 255  # white: clipping x0 to [-1, 1] sets it right, which helps a young model
COLOURS = np.array(
    [(220, 40, 40), (250, 140, 0), (40, 160, 60), (0, 160, 190), (40, 80, 220), (150, 50, 190)], dtype=np.int32
)

# Outlines are points of the complex plane within the unit circle: turning and scaling one is a multiplication.
_CIRCLE = np.exp(2j * np.pi * np.arange(32) / 32)
_HALF_CIRCLE = np.exp(1j * np.pi * np.arange(17) / 16)
_STAR = np.exp(2j * np.pi * np.arange(10) / 10) * np.where(np.arange(10) % 2, 0.45, 1)
_CROSS = np.array([1 + 0.35j, 0.35 + 0.35j, 0.35 + 1j, -0.35 + 1j]) / abs(1 + 0.35j)
_ARROW = np.array([1, 0.1 + 0.8j, 0.1 + 0.3j, -0.9 + 0.3j, -0.9 - 0.3j, 0.1 - 0.3j, 0.1 - 0.8j])
_ANGLE = 2 * np.pi * np.arange(40) / 40
_HEART = (
    16j * np.sin(_ANGLE) ** 3
    + 13 * np.cos(_ANGLE)
    - 5 * np.cos(2 * _ANGLE)
    - 2 * np.cos(3 * _ANGLE)
    - np.cos(4 * _ANGLE)
) / 17

# Each kind is what is filled, then what is cut out of it again.
KINDS: dict[str, list[np.ndarray]] = {
    "circle": [_CIRCLE],
    "ring": [_CIRCLE, 0.55 * _CIRCLE],
    "crescent": [_CIRCLE, 0.45 + 0.8 * _CIRCLE],
    "half-disc": [0.92 * (_HALF_CIRCLE - 0.4j)],
    "triangle": [_CIRCLE[[0, 11, 21]]],
    "square": [_CIRCLE[::8]],
    "star": [_STAR],
    "cross": [np.concatenate([_CROSS[:3] * 1j**k for k in range(4)])],
    "heart": [_HEART],
    "arrow": [_ARROW],
}


def draw_shapes(count: int, seed: int = 0) -> np.ndarray:
    """Pictures of one shape each: ten kinds, six colours, any place, size and turn, on a white ground.

    The same seed gives the same bytes on every machine: all that is random comes from
    `RandomState.random_sample`, whose stream numpy has frozen, and Pillow is given whole pixels.

    Returns:
        uint8 (count, 3, 32, 32).
    """
    random = np.random.RandomState(seed).random_sample((6, count))
    kind = (random[0] * len(KINDS)).astype(int)
    colour = COLOURS[(random[1] * len(COLOURS)).astype(int)]  # (count, 3)
    radius = 8 + 5 * random[2]
    place = radius + (SIZE - 2 * radius) * random[3] + 1j * (radius + (SIZE - 2 * radius) * random[4])
    turn_and_scale = radius * np.exp(2j * np.pi * random[5])

    outlines = list(KINDS.values())
    coverage = np.empty((count, SIZE, SIZE), dtype=np.int32)  # 0 is ground, 255 is shape
    for i in tqdm(range(count), desc="drawing shapes", unit=" images", disable=distributed.hides_bars()):
        image = Image.new("L", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), 0)
        draw = ImageDraw.Draw(image)
        for outline, fill in zip(outlines[kind[i]], (255, 0)):
            points = np.rint((outline * turn_and_scale[i] + place[i]) * OVERSAMPLING)
            draw.polygon(np.stack([points.real, points.imag], axis=-1).ravel().tolist(), fill=fill)
        coverage[i] = np.asarray(image.reduce(OVERSAMPLING))

    coverage = coverage[:, None]  # (count, 1, 32, 32)
    blend = GROUND * (255 - coverage) + colour[:, :, None, None] * coverage
    return ((blend + 127) // 255).astype(np.uint8)
