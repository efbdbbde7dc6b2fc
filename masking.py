"""Which patches to hide: blockwise masking (BEiT, arXiv 2106.08254, algorithm 1) and random masking
(table 4).

`python masking.py` prints three masks of each kind.
"""

import math

import numpy as np


def blockwise_mask(
    height, width, num_masked, min_block=16, max_block=None, min_aspect=0.3, rng=None
):
    """Hide rectangular blocks of patches until `num_masked` are hidden or no block fits (algorithm
    1).

    A block has min_block to max_block patches (None: as many as are still to hide), an aspect ratio
    log-uniform in [min_aspect, 1 / min_aspect], and is smaller than the grid in both directions.
    Returns a bool array (height, width), True = hidden: at least one patch, at most `num_masked`.
    For the paper's 75 of 14x14 the mean is 74.5, because the last few patches often fit no block.
    `rng` is a numpy Generator. Raises ValueError if such a mask cannot be placed.
    """
    if not 0 < num_masked < height * width:
        raise ValueError(
            f"num_masked={num_masked} of a {height}x{width} grid: hide at least 1 patch "
            f"and at most {height * width - 1}"
        )
    if not 0 < min_block <= num_masked:
        raise ValueError(
            f"min_block={min_block} with num_masked={num_masked}: a block has at least 1 and "
            "at most num_masked patches; lower min_block or hide more"
        )
    if max_block is not None and max_block < min_block:
        raise ValueError(f"max_block={max_block} is below min_block={min_block}; raise it")
    if not 0 < min_aspect <= 1:
        raise ValueError(f"min_aspect={min_aspect} is outside (0, 1]")
    random = (
        rng or np.random.default_rng()
    ).random  # one uniform draw costs a third of rng.integers
    mask = np.zeros((height, width), dtype=bool)
    hidden, tries = 0, 0
    # Ten tries a block as in the paper's code, but the first block is tried until it is there: an
    # empty mask would make the loss 0 / 0. 10,000 tries without one mean that the grid is too small
    # for it.
    while hidden < num_masked and tries < (10 if hidden else 10_000):
        tries += 1
        room = num_masked - hidden if max_block is None else min(num_masked - hidden, max_block)
        area = (
            min_block + (room - min_block) * random()
        )  # room < min_block: an area between the two
        aspect = math.exp((2 * random() - 1) * math.log(min_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = int(random() * (height - h + 1)), int(random() * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= room:
            block[:] = True
            hidden, tries = hidden + new, 0
    if not hidden:
        raise ValueError(
            f"no block of at least {min_block} patches fits a {height}x{width} grid "
            f"when {num_masked} are to hide; lower min_block"
        )
    return mask


def random_mask(height, width, num_masked, rng=None):
    """Hide exactly `num_masked` patches, each equally likely. Returns and raises as
    `blockwise_mask`."""
    if not 0 < num_masked <= height * width:
        raise ValueError(
            f"num_masked={num_masked} of a {height}x{width} grid: hide at least 1 patch "
            f"and at most {height * width}"
        )
    mask = np.zeros(height * width, dtype=bool)
    mask[(rng or np.random.default_rng()).permutation(height * width)[:num_masked]] = True
    return mask.reshape(height, width)


if __name__ == "__main__":
    for draw in (blockwise_mask, random_mask):
        masks = [draw(14, 14, 75, rng=np.random.default_rng(seed)) for seed in range(3)]
        print(draw.__name__)
        for row in np.where(np.concatenate(masks, axis=1), "##", ". "):
            print("  ".join("".join(part) for part in np.split(row, 3)))
