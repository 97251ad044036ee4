"""Two images on one canvas, one task each: the class at the top left and at the bottom right."""

from dataclasses import dataclass

import numpy as np

from flatmtl.demo.idx import SIDE, LabelledImages

CANVAS = 36
SHIFTS = 5  # top-left offsets are 0..4 in each direction, bottom-right offsets 4..8
TASKS = ("top left", "bottom right")


@dataclass(frozen=True)
class Pairs:
    """Overlaid pairs and where they come from."""

    images: np.ndarray  # uint8 [N, 36, 36]
    labels: np.ndarray  # int64 [N, 2], one column per task
    sources: np.ndarray  # int64 [N, 2], which image each half was taken from
    offsets: np.ndarray  # int64 [N, 2, 2], (row, column) of each half's corner


@dataclass(frozen=True)
class PairSplits:
    """Train, validation and test pairs that share no image."""

    train: Pairs
    validation: Pairs
    test: Pairs


def make_pairs(data: LabelledImages, pool: np.ndarray, count: int, seed: int) -> Pairs:
    """Draws ``count`` pairs with different labels from the images numbered in ``pool``.

    Every image of the pool stands at the top left equally often (to within one), its partner is
    uniform over the pool's images of other classes. Where the two overlap, the brighter pixel wins.
    """
    generator = np.random.default_rng(seed)
    rounds = -(-count // len(pool))
    first = np.concatenate([generator.permutation(pool) for _ in range(rounds)])[:count]
    second = _partners(data.labels, pool, first, generator)
    sources = np.stack([first, second], axis=1)  # [N, 2]
    offsets = generator.integers(0, SHIFTS, size=(count, 2, 2))
    offsets[:, 1] += CANVAS - SIDE - (SHIFTS - 1)
    halves = [place(data.images[sources[:, k]], offsets[:, k]) for k in range(2)]
    return Pairs(np.maximum(*halves), data.labels[sources].astype(np.int64), sources, offsets)


def make_splits(
    train: LabelledImages, test: LabelledImages, counts: tuple[int, int, int], seed: int = 0
) -> PairSplits:
    """Train, validation and test pairs, ``counts`` of each.

    The last fifth of the train images is kept out of the train pairs and makes the validation
    pairs; test pairs come from the test images only.
    """
    cut = len(train.labels) - len(train.labels) // 5
    pools = (np.arange(cut), np.arange(cut, len(train.labels)), np.arange(len(test.labels)))
    for pool, name in zip(pools, ("train", "validation", "test"), strict=True):
        labels = (test if name == "test" else train).labels[pool]
        if len(np.unique(labels)) < 2:
            raise ValueError(
                f"data: {name} images must have at least two classes to make pairs of, "
                f"got {len(pool)} images of {len(np.unique(labels))}"
            )
    return PairSplits(
        make_pairs(train, pools[0], counts[0], seed),
        make_pairs(train, pools[1], counts[1], seed + 1),
        make_pairs(test, pools[2], counts[2], seed + 2),
    )


def _partners(
    labels: np.ndarray, pool: np.ndarray, first: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """One image of another class for each of ``first``, uniform and without rejection."""
    by_class = pool[np.argsort(labels[pool], kind="stable")]
    ordered = labels[by_class]
    begin = np.searchsorted(ordered, labels[first], side="left")  # [N]
    end = np.searchsorted(ordered, labels[first], side="right")  # [N]
    # Draw among the pool without the own class, then step over that class's stretch.
    rank = generator.integers(0, len(pool) - (end - begin))
    rank += np.where(rank >= begin, end - begin, 0)
    return by_class[rank]


def place(images: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each image on an empty canvas with its corner at its offset: [N, 28, 28] -> [N, 36, 36]."""
    canvas = np.zeros((len(images), CANVAS, CANVAS), dtype=np.uint8)
    extent = np.arange(SIDE)
    rows = (offsets[:, :1] + extent)[:, :, None]  # [N, 28, 1]
    columns = (offsets[:, 1:] + extent)[:, None, :]  # [N, 1, 28]
    canvas[np.arange(len(images))[:, None, None], rows, columns] = images
    return canvas
