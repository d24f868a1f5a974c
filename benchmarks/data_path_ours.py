"""The contestants of `data_path.py` that run this project's own data path.

Each takes a `Task` and returns `consume(parts)`, which reads the Parquet files of the folder
`parts` once and returns at least `images`. What is done before `consume` is called, and the call
with the 64 images of the warm-up, is not measured. Other keys that the table shows:
`first_batch_s`, and `object_store_bytes` (bytes that were put into Ray's object store).
"""

from __future__ import annotations

from data_path_run import Consume, Task


def ours_streaming(task: Task) -> Consume:
    """Encoded images through Ray Data, decoded by the consumer; every image used once."""
    raise NotImplementedError("wired by the owner of the data path")


def ours_prepared(task: Task) -> Consume:
    """Batches from the prepared, memory-mapped store, which is written before the measurement."""
    raise NotImplementedError("wired by the owner of the data path")


def ours_first_batch(task: Task) -> Consume:
    """Seconds from making the dataset to its first batch (`first_batch_s`)."""
    raise NotImplementedError("wired by the owner of the data path")
