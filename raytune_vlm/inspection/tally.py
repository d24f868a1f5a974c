"""The account of `validate`: seen = good + bad, reasons, duplicates, groups in two splits.

Memory grows by an id and an origin a row (some 200 bytes), as that of `prepare` does; pictures and
texts are not kept.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from raytune_vlm.inspection.rows import PROMPT_SPLITS, Checked, Row
from raytune_vlm.records import SPLITS, Quarantined

MAX_EXAMPLES = 10


@dataclass(frozen=True)
class Reason:
    """A reason for which rows were refused: of the first one, and how many there are."""

    text: str
    count: int
    origin: str


@dataclass(frozen=True)
class Verdict:
    """What `validate` found."""

    num_seen: int
    num_good: int
    num_bad: int
    num_over_long: int
    """Good rows that are longer than `data.max_length`; see `data.over_long`."""
    reasons: tuple[Reason, ...]
    """Most frequent first, at most ten."""
    num_reasons: int
    num_duplicates: int
    """Rows that repeat an earlier one of the same split exactly, bad ones among them."""
    duplicates: tuple[tuple[str, str], ...]
    """The first of them: origin, and origin of the row that it repeats."""
    shared_groups: dict[str, int]
    """`"train/report"` -> groups in both splits; only pairs of splits that sources name."""
    named_splits: bool
    """Whether any source names its split."""

    @property
    def bad_fraction(self) -> float:
        """Share of the rows that are bad."""
        return self.num_bad / self.num_seen if self.num_seen else 0.0


class Tally:
    """Counts rows as they come."""

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        self.num_seen = self.num_bad = self._num_over_long = self._num_duplicates = 0
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Quarantined] = {}
        self._seen: dict[bytes, str] = {}
        self._duplicates: list[tuple[str, str]] = []
        self._groups: dict[str, set[bytes]] = {split: set() for split in SPLITS}

    def add(self, row: Row) -> Quarantined | None:
        """Count a row; returns it as quarantined where it is bad.

        As in preparation, a row that repeats one of `select` or `report` is bad: it would count
        twice in a score.
        """
        self.num_seen += 1
        if isinstance(row, Checked):
            first = self._repeats(row)
            if first is None or row.split not in PROMPT_SPLITS:
                self._add_good(row)
                return None
            row = Quarantined(row.sample.origin, f"exact duplicate of {first}", row.split)
        self.num_bad += 1
        kind = row.kind
        self._counts[kind] += 1
        self._first.setdefault(kind, row)
        return row

    def verdict(self) -> Verdict:
        """The account of all rows so far."""
        pairs = combinations(SPLITS, 2)
        shared = {f"{a}/{b}": len(self._groups[a] & self._groups[b]) for a, b in pairs}
        return Verdict(
            num_seen=self.num_seen,
            num_good=self.num_seen - self.num_bad,
            num_bad=self.num_bad,
            num_over_long=self._num_over_long,
            reasons=tuple(
                Reason(self._first[kind].reason, count, self._first[kind].origin)
                for kind, count in self._counts.most_common(MAX_EXAMPLES)
            ),
            num_reasons=len(self._counts),
            num_duplicates=self._num_duplicates,
            duplicates=tuple(self._duplicates),
            shared_groups={pair: count for pair, count in shared.items() if count},
            named_splits=any(self._groups.values()),
        )

    def _repeats(self, row: Checked) -> str | None:
        """The origin of an equal row of the same split that came earlier."""
        key = bytes.fromhex(row.sample.sample_id) + row.split[:1].encode()
        first = self._seen.setdefault(key, row.sample.origin)
        if first is row.sample.origin:
            return None
        self._num_duplicates += 1
        if len(self._duplicates) < MAX_EXAMPLES:
            self._duplicates.append((row.sample.origin, first))
        return first

    def _add_good(self, row: Checked) -> None:
        if row.encoded is not None and len(row.encoded.input_ids) > self._max_length:
            self._num_over_long += 1
        if row.split in self._groups:
            digest = hashlib.blake2b(row.sample.group_id.encode("utf-8", "replace"), digest_size=8)
            self._groups[row.split].add(digest.digest())
