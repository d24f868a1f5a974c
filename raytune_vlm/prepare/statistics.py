"""What the index says of the whole data: duplicates, lengths, and what was refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import DataError
from raytune_vlm.records import Quarantined, SplitStatistics, by_kind

WORST_REASONS = 10
"""Kinds of reasons that are named when too much is bad."""

HISTOGRAM_BINS = 24

_MEANS = ("num_labelled", "num_media")


def without_duplicates(
    index: pa.Table, *, in_training: bool
) -> tuple[pa.Table, list[Quarantined], int]:
    """The index with one copy of each sample, the first.

    A sample that stands twice in `select` or `report` would count twice in a score, so its later
    copies are quarantined; in `train` they are removed only where that is asked for.

    Returns
    -------
    tuple
        The index, the quarantined copies, and the number of copies removed from `train`.
    """
    if len(index) == 0:
        return index, [], 0
    names = pc.binary_join_element_wise(index["split"], index["sample_id"], "/")
    codes = names.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(codes, return_index=True)
    copy = np.ones(len(index), dtype=bool)
    copy[first] = False
    train = np.asarray(pc.equal(index["split"], "train"))
    quarantined = []
    for place in np.flatnonzero(copy & ~train).tolist():
        original = index["origin"][int(first[codes[place]])].as_py()
        row = index.slice(place, 1)
        quarantined.append(
            Quarantined(
                row["origin"][0].as_py(),
                f"exact duplicate of {original}",
                row["split"][0].as_py(),
            )
        )
    removed = copy & train if in_training else np.zeros(len(index), dtype=bool)
    kept = ~(copy & ~train | removed)
    whole = bool(kept.all())
    return index if whole else index.filter(pa.array(kept)), quarantined, int(removed.sum())


def refuse_bad(experiment: ExperimentConfig, num_good: int, quarantine: list[Quarantined]) -> None:
    """Raise DataError if more than `data.max_bad_fraction` of the samples are bad, or none is."""
    seen, bad = num_good + len(quarantine), len(quarantine)
    allowed = experiment.data.max_bad_fraction
    if seen == 0:
        where = ", ".join(source.path for source in experiment.data.sources)
        raise DataError(f"data.sources: no samples in {where}")
    if bad <= allowed * seen:
        return
    listed = "; ".join(
        f"{first.origin}: {first.reason}" + (f" (and {count - 1} more)" if count > 1 else "")
        for first, count in by_kind(quarantine)[:WORST_REASONS]
    )
    raise DataError(
        f"{bad} of {seen} samples cannot be used, more than "
        f"data.max_bad_fraction={allowed:g} allows: {listed}"
    )


def split_statistics(
    name: str,
    index: pa.Table,
    quarantine: list[Quarantined],
    *,
    num_over_long: int,
    num_duplicates: int,
) -> SplitStatistics:
    """The figures of one split; seen = used + quarantined + over-long + duplicates removed."""
    # Only what is counted: a filter copies every column.
    counted = index.select(["length", "group_id", "num_images", *_MEANS, "truncated"])
    rows = counted.filter(pc.equal(index["split"], name))
    refused = sum(entry.split == name for entry in quarantine)
    lengths = rows["length"].to_numpy()
    top = max(int(lengths.max()), 1) if len(rows) else 1
    counts, edges = np.histogram(lengths, bins=min(HISTOGRAM_BINS, top), range=(0, top))
    return SplitStatistics(
        num_seen=len(rows) + refused + num_over_long + num_duplicates,
        num_used=len(rows),
        num_quarantined=refused,
        num_dropped_over_long=num_over_long,
        num_groups=len(rows["group_id"].unique()),
        num_images=int(pc.sum(rows["num_images"]).as_py() or 0),
        max_length=int(lengths.max()) if len(rows) else 0,
        mean_length=float(lengths.mean()) if len(rows) else 0.0,
        mean_labelled=float(pc.mean(rows["num_labelled"]).as_py() or 0.0),
        mean_media=float(pc.mean(rows["num_media"]).as_py() or 0.0),
        num_truncated=int(pc.sum(rows["truncated"]).as_py() or 0),
        num_duplicates=num_duplicates,
        length_counts=counts.tolist() if len(rows) else [],
        length_edges=[round(float(edge), 1) for edge in edges] if len(rows) else [],
    )
