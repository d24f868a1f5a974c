"""`answers.jsonl`: every reply that a teacher gave, as it came, and what all of them cost.

A reply is on the disk before anything is made of it, so that none is paid for twice; a torn last
line (a writer that was killed) is cut off. One process at a time holds the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raytune_vlm.errors import DataError, LabellingStopped, LeaseError
from raytune_vlm.label.question import Question


@dataclass(frozen=True)
class Answer:
    """A reply, read."""

    text: str | None
    """None where it is no chat completion; such a reply is asked for again."""
    truncated: bool
    """Cut at the longest length that was asked for."""
    input_tokens: int | None
    """As the server counts them; None where it does not."""
    output_tokens: int | None


@dataclass
class Spent:
    """What replies took."""

    replies: int = 0
    repairs: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    """Of those with prices."""
    uncounted: int = 0
    """Replies whose server does not say how many tokens they took."""

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.input_tokens + self.output_tokens

    def add(self, row: dict[str, Any]) -> None:
        """Count one row of the file."""
        self.replies += 1
        self.repairs += row["attempt"]
        self.uncounted += row["input_tokens"] is None or row["output_tokens"] is None
        self.input_tokens += row["input_tokens"] or 0
        self.output_tokens += row["output_tokens"] or 0
        self.cost += row["cost"] or 0.0


@dataclass
class Account:
    """What all replies of a folder took, together and by teacher and task."""

    total: Spent = field(default_factory=Spent)
    parts: dict[tuple[str, str], Spent] = field(default_factory=dict)
    largest: dict[tuple[str, str], int] = field(default_factory=dict)
    """The most tokens that a first question of a teacher and task had."""

    def add(self, row: dict[str, Any]) -> None:
        """Count one row of the file."""
        part = (row["teacher"], row["task"])
        self.total.add(row)
        self.parts.setdefault(part, Spent()).add(row)
        if row["attempt"] == 0 and row["input_tokens"] is not None:
            self.largest[part] = max(self.largest.get(part, 0), row["input_tokens"])

    def to_json(self) -> dict[str, Any]:
        """`cost.json`."""
        parts = [
            {"teacher": teacher, "task": task, **asdict(spent)}
            for (teacher, task), spent in sorted(self.parts.items())
        ]
        return {"total": asdict(self.total), "parts": parts}


class AnswerLog:
    """The open file; `append` may be called by several threads. A context manager.

    Raises
    ------
    LeaseError
        If another process has it.
    DataError
        If it is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self.account = Account()
        self._known: dict[tuple[str, int], Answer] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("ab", buffering=0)
        self._is_whole = True
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise LeaseError(f"{file.parent}: another process labels into this folder") from None
        try:
            for row in _rows(file):
                self._take(row)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def known(self, key: str, attempt: int) -> Answer | None:
        """The answer to a question that was asked before."""
        return self._known.get((key, attempt))

    def append(self, question: Question, reply: Any) -> Answer:
        """Keep a reply for good and read it.

        Raises
        ------
        LabellingStopped
            If it cannot be written: nothing more must be asked then.
        """
        unit, answer = question.unit, read_reply(reply)
        tokens = (answer.input_tokens, answer.output_tokens)
        row = {
            "key": unit.key,
            "attempt": question.attempt,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "page": unit.page.page_id,
            "origin": unit.page.origin,
            "task": unit.task.name,
            "teacher": unit.teacher.name,
            "model": unit.teacher.model,
            "sampling": unit.sampling,
            **asdict(answer),
            "cost": unit.teacher.cost(tokens[0] or 0, tokens[1] or 0),
            "reply": reply,
        }
        data = (json.dumps(row) + "\n").encode("ascii")
        with self._lock:
            if not self._is_whole:
                raise LabellingStopped(f"{self._file}: cannot be written")
            try:
                while data:
                    data = data[self._stream.write(data) :]
                os.fsync(self._stream.fileno())
            except OSError as error:
                self._is_whole = False
                raise LabellingStopped(f"{self._file}: {error.strerror}") from error
            self._take(row)
        return answer

    def _take(self, row: dict[str, Any]) -> None:
        self.account.add(row)
        if row["text"] is not None:
            answer = Answer(**{name: row[name] for name in Answer.__dataclass_fields__})
            self._known[row["key"], row["attempt"]] = answer


def read_reply(reply: Any) -> Answer:
    """What a reply says; a reply without content is an empty answer: its tokens went elsewhere."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    counts = [
        usage.get(name) if isinstance(usage, dict) else None
        for name in ("prompt_tokens", "completion_tokens")
    ]
    read, written = (count if isinstance(count, int) else None for count in counts)
    try:
        choice = reply["choices"][0]
        content, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Answer(None, False, read, written)
    text = "" if content is None else content
    return Answer(text if isinstance(text, str) else None, reason == "length", read, written)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of the file; a last line without its end is cut off."""
    start = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            start += len(line)
            try:
                row = json.loads(line)
                yield {name: row[name] for name in _READ}
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{file}:{number}: is damaged; restore it or begin anew") from None
    os.truncate(file, start)


_READ = ("key", "attempt", "teacher", "task", "cost", *Answer.__dataclass_fields__)
