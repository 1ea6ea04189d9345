"""Pictures of several shapes in one training: each goes into the nearest of some sizes of about as many pixels (a bucket), a batch holds one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from sfumato.core.rng import shuffled
from sfumato.data.folder import framed

Size = tuple[int, int]  # height, width
LONGEST = 2.0  # of a bucket: times its other side


def bucket_sizes(side: int, step: int) -> list[Size]:
    """Sizes whose sides are multiples of `step`, of at most side x side pixels, the longer as long as the other allows; and turned."""
    if step < 1 or side % step:
        raise ValueError(f"bucket (={step}) must be a divisor of the side (={side}): the step between sides of pictures")
    tall = [(side * side // w // step * step, w) for w in range(step, side + 1, step)]
    return sorted({s for h, w in tall if h <= LONGEST * w for s in ((h, w), (w, h))})


def nearest_size(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size that cuts least of a picture of this width and height; of several the largest."""
    return min(sizes, key=lambda s: (abs(math.log(width / height) - math.log(s[1] / s[0])), -s[0] * s[1]))


def fitted(image: Image.Image, size: Size) -> Image.Image:
    """The picture at a size: its middle, as much as there is room for; what is transparent is kept whole."""
    height, width = size
    if height == width:
        return framed(image, width)
    if image.mode == "RGBA":
        share = min(width / image.width, height / image.height)
        inner = image.convert("RGBa").resize((max(1, round(image.width * share)), max(1, round(image.height * share))), Image.Resampling.LANCZOS)
        sheet = Image.new("RGBA", (width, height))
        sheet.paste(inner.convert("RGBA"), ((width - inner.width) // 2, (height - inner.height) // 2))
        return sheet
    return covering(image, width, height)


def covering(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at this size: its middle, as large as it can be, without being stretched."""
    share = max(width / image.width, height / image.height)
    box = [max(0.0, (side - wanted / share) / 2) for side, wanted in ((image.width, width), (image.height, height))]
    whole = (box[0], box[1], image.width - box[0], image.height - box[1])
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS, box=whole, reducing_gap=3.0)


@dataclass
class BatchOrder:
    """Which rows stand at positions of an endless order in which every `batch` positions are of one group.

    Groups come as often as they have rows: in as many batches as there are rows, each row is seen `batch` times. Within a group rows come in shuffled
    epochs. A pure function of the seed and the position.
    """

    groups: Sequence[np.ndarray]
    batch: int
    seed: int
    _tables: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.count = sum(map(len, self.groups))
        self.group_of = np.concatenate([np.full(len(g), i) for i, g in enumerate(self.groups)])

    def group(self, position: int) -> int:
        """The group of the batch that holds a position."""
        return int(self._table(position)[0][position // self.batch % self.count])

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The rows at positions of one batch."""
        step, first = int(positions[0]) // self.batch, int(positions[0])
        round_, at = divmod(step, self.count)
        groups, ranks = self._table(first)
        members = self.groups[groups[at]]
        within = (round_ * len(members) + ranks[at]) * self.batch + (positions - step * self.batch)
        return members[shuffled(len(members), self.seed, f"order/bucket/{groups[at]}", within)]

    def _table(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Of as many batches as there are rows: the group of each, and how many of the same group were before it."""
        round_ = position // self.batch // self.count
        if round_ not in self._tables:
            groups = self.group_of[shuffled(self.count, self.seed, "order/batch", round_ * self.count + np.arange(self.count))]
            ranks = np.empty(self.count, dtype=np.int64)
            for g in range(len(self.groups)):
                here = groups == g
                ranks[here] = np.arange(int(here.sum()))
            self._tables = {round_: (groups, ranks)}
        return self._tables[round_]
