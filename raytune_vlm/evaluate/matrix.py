"""One metric of many evaluations, sample by sample, for tests and for the choice of a winner."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytune_vlm.errors import EvaluationError, did_you_mean
from raytune_vlm.evaluate.scoring import (
    SUMS,
    WEIGHT,
    Floats,
    metrics_in,
    read_table,
    refuse_repeats,
)


def read_matrix(
    files: Sequence[Path], metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[str], list[str]]:
    """One metric of many trials on the same samples.

    Parameters
    ----------
    files
        T files of predictions.

    Returns
    -------
    values [T, S] or sums [T, S, K], weights [T, S], groups [S], sample_ids [S]
        In the order of the first file's samples. Sums for a metric with `combine`, which the
        functions of `statistics` then need as well.

    Raises
    ------
    EvaluationError
        There is no file, one cannot be read or lacks the metric, or two differ in their samples or
        in how these are grouped.
    """
    if not files:
        raise EvaluationError(f"there are no predictions to compare by {metric}")
    values, weights = [], []
    reference: dict[str, str] = {}
    for file in files:
        table = _read_metric(file, metric)
        ids, groups = table["sample_id"].to_pylist(), table["group_id"].to_pylist()
        refuse_repeats(ids, str(file))
        grouped = dict(zip(ids, groups, strict=True))
        reference = reference or grouped
        if grouped != reference:
            raise EvaluationError(_difference(files[0], reference, file, grouped))
        rows = {sample_id: row for row, sample_id in enumerate(ids)}
        order = np.array([rows[sample_id] for sample_id in reference], dtype=int)
        values.append(_values(table, metric)[order])
        weights.append(table[metric + WEIGHT].to_numpy()[order])
    return np.stack(values), np.stack(weights), list(reference.values()), list(reference)


def paired_values(tables: Sequence[pa.Table], metric: str) -> tuple[Floats, Floats]:
    """Values [T, S] (or sums [T, S, K]) and weights [T, S] of tables of the same samples."""
    return (
        np.stack([_values(table, metric) for table in tables]),
        np.stack([table[metric + WEIGHT].to_numpy() for table in tables]),
    )


def _values(table: pa.Table, metric: str) -> NDArray[np.float64]:
    """The samples' values [S], or their sums [S, K] where the file has them."""
    if metric + SUMS in table.column_names:
        return np.array(table[metric + SUMS].to_pylist(), dtype=np.float64)
    values: NDArray[np.float64] = table[metric].to_numpy()
    return values


def _read_metric(file: Path, metric: str) -> pa.Table:
    """The columns of one metric, and the samples they belong to."""
    wanted = ["sample_id", "group_id", metric, metric + WEIGHT]
    table = read_table(file, [*wanted, metric + SUMS])
    if missing := [name for name in wanted if name not in table.column_names]:
        known = metrics_in(pq.read_schema(file).names)
        hint = did_you_mean(metric, known) if missing[0] == metric else ""
        raise EvaluationError(f"{file} has no column {missing[0]!r}{hint}")
    return table


def _difference(first: Path, expected: dict[str, str], second: Path, found: dict[str, str]) -> str:
    """In words, how two files differ in their samples or groups."""
    lacking = [name for name in expected if name not in found]
    added = [name for name in found if name not in expected]
    if lacking or added:
        example = (lacking or added)[0]
        return (
            f"{first} and {second} are not of the same samples: {len(lacking)} only in the first, "
            f"{len(added)} only in the second, for example {example!r}"
        )
    moved = next(name for name, group in expected.items() if found[name] != group)
    return (
        f"{first} and {second} group the sample {moved!r} differently: "
        f"{expected[moved]!r} and {found[moved]!r}"
    )
