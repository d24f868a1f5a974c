"""Follows a ledger while it grows, for those that only watch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class LedgerTail:
    """Reads a ledger bit by bit; the file need not be there yet."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read = 0
        """Bytes that were read."""

    def new(self) -> list[dict[str, Any]]:
        """The events of all whole lines since the last call."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._read)
            found = stream.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
