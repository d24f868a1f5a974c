"""Token lengths like those of receipts with images, for measuring packing.

python benchmarks/data_path_lengths.py      # what they are like
"""

from __future__ import annotations

import numpy as np

LONGEST, SHORTEST = 3500, 64
LONG_SHARE = 0.02


def receipt_like_lengths(num_samples: int, seed: int) -> np.ndarray:
    """int64 `[num_samples]`: lengths of samples in tokens, image tokens included.

    A made-up distribution, not a fitted one. 98 in 100 are ordinary receipts: log-normal around 690
    tokens (0.5 megapixels are about 640 image tokens of 28 x 28 pixels in Qwen2.5-VL, the text is
    short) with a spread of 0.24, which is narrow: one camera or scanner, one instruction. 2 in 100
    are long ones (A4 pages, receipts of a hundred items) around 1,800 with a spread of 0.4. All are
    clipped to 64..3,500, which fits a budget of 4,096.

    Median 695, one in a hundred above 1,780; random batches of 8, padded to their longest, hold
    0.65 tokens a place. For comparison: the 79 scans of SROIE, of several scanners, spread by
    0.45 around 1,600 image tokens, and random batches of 8 of them would be filled to 0.63.
    """
    rng = np.random.default_rng(seed)
    is_long = rng.random(num_samples) < LONG_SHARE
    ordinary = rng.lognormal(np.log(690), 0.24, num_samples)
    long = rng.lognormal(np.log(1800), 0.4, num_samples)
    lengths = np.rint(np.where(is_long, long, ordinary))
    return np.clip(lengths, SHORTEST, LONGEST).astype(np.int64)


def padding_efficiency(lengths: np.ndarray, batch_size: int, seed: int) -> float:
    """Tokens a place in random batches that are padded to their longest sample."""
    order = np.random.default_rng(seed).permutation(lengths)
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
    return float(batches.sum() / (batches.max(axis=1) * batch_size).sum())


def main() -> None:
    """Print the quantiles and what padding makes of them."""
    lengths = receipt_like_lengths(100_000, seed=0)
    shares = (0, 1, 5, 50, 95, 99, 99.9, 100)
    for share, value in zip(shares, np.percentile(lengths, shares), strict=True):
        print(f"{share:5} %: {value:.0f}")
    print(
        f"mean {lengths.mean():.0f}; random batches of 8: {padding_efficiency(lengths, 8, 0):.3f}"
    )


if __name__ == "__main__":
    main()
