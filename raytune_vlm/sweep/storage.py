"""Errors that the storage is to blame for: it is full, takes nothing, or is not there any more.

No recipe is to blame for them, and every other trial would fail of them too: the run ends with
status 3, and goes on when the storage is back.
"""

from __future__ import annotations

import sqlite3
from errno import EDQUOT, EIO, ENOSPC, EROFS, ESTALE

from raytune_vlm.errors import StorageFull, first_line
from raytune_vlm.records import SweepFolder

_REASONS = {EDQUOT, EIO, ENOSPC, EROFS, ESTALE}
_SQLITE = ("disk is full", "disk I/O error", "readonly database", "unable to open database")


def storage_failure(error: BaseException, folder: SweepFolder) -> str | None:
    """What is wrong with the storage of a sweep, in one line; None if the error is another."""
    cause: BaseException | None = error
    while cause is not None:
        of_sqlite = isinstance(cause, sqlite3.OperationalError)
        if (
            isinstance(cause, StorageFull)
            or getattr(cause, "errno", None) in _REASONS
            or (of_sqlite and any(words in str(cause) for words in _SQLITE))
        ):
            return first_line(error)
        cause = cause.__cause__ or cause.__context__
    try:
        folder.ledger_file.stat()  # the one file that every session has
    except OSError as gone:
        return f"{folder.root} is not there any more: {gone}"
    return None
