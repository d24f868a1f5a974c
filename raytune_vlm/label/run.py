"""Labelling: the questions that are not answered yet, asked within limits and a budget.

The main thread reads pages, decides what is asked and keeps the budget; threads send requests.
What is asked next follows from `answers.jsonl` alone: a run that was killed goes on where it was.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from raytune_vlm.config.label import LabelConfig, Teacher
from raytune_vlm.errors import EvaluationError, LabellingStopped
from raytune_vlm.evaluate.chat_server import ChatServer, NoAnswer, Refused
from raytune_vlm.images import ImageError
from raytune_vlm.label.answers import Answer, AnswerLog
from raytune_vlm.label.check import Unfit, read_answer
from raytune_vlm.label.folder import LabelFolder, Rejected, Result, write_config
from raytune_vlm.label.pages import read_pages
from raytune_vlm.label.question import Question, Unit, request_of, unit_of
from raytune_vlm.records import Quarantined, write_json
from raytune_vlm.visible import visible

OF_THE_PAGE = (400, 413, 422)
"""Statuses with which a server may refuse one page and take the next; 400: moderation."""
STOP_AFTER = 8
"""Failed requests in a row after which the server, not the pages, is at fault."""

Progress = Callable[[int, int, str], None]
"""Files read, of all, and how labelling stands in words."""


@dataclass
class Tally:
    """What a run did."""

    num_pages: int = 0
    """Pages and whole documents that were asked about."""
    num_copies: int = 0
    """Pages whose very images stood before: labelled once."""
    num_asked: int = 0
    """Requests that were answered in this run."""
    num_known: int = 0
    """Wanted answers that earlier runs had paid for."""
    num_unanswered: int = 0
    """Wanted answers that did not come at any try; the next run asks again."""
    num_results: int = 0
    num_labels: int = 0
    rejected: list[Rejected] = field(default_factory=list)


class Labelling:
    """One run over all pages.

    Parameters
    ----------
    log
        The answers so far; more are added.
    limit
        Only the first so many pages.
    sleep
        Waits between the tries of a request; for tests.

    Raises
    ------
    EvaluationError
        If the environment variable or the file of a key does not hold it.
    """

    def __init__(
        self,
        config: LabelConfig,
        folder: LabelFolder,
        log: AnswerLog,
        limit: int | None = None,
        progress: Progress = lambda done, total, detail: None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._config, self._folder, self._log = config, folder, log
        self._limit, self._progress, self._ended = limit, progress, threading.Event()
        self._servers = {
            teacher.name: ChatServer(
                teacher,
                f"teachers.{teacher.name}",
                f"teachers.{teacher.name}.api_key_env",
                sleep=sleep or self._pause,
            )
            for teacher in config.teachers
        }
        self._running: dict[Future[Answer], Question] = {}
        self._queue: deque[Question] = deque()
        self._order: dict[str, int] = {}
        self._seen: set[tuple[str, str]] = set()
        self._results: list[Result] = []
        self._failed_in_a_row: Counter[str] = Counter()
        self.tally = Tally()

    def run(self) -> Tally:
        """Ask everything; the folder's files are written however it ends.

        Raises
        ------
        LabellingStopped
            If the budget is used up, a teacher is out of reach, or the disk is full.
        EvaluationError
            If a teacher refuses to be asked at all, or gives no usage where a budget is set.
        DataError
            If a path is wrong.
        """
        try:
            self._run()
        except OSError as error:
            why = error.strerror or str(error)
            raise LabellingStopped(
                f"{self._folder.root}: {why}; what was answered is kept"
            ) from error
        return self.tally

    def _run(self) -> None:
        write_config(self._folder, self._config)
        try:
            with ThreadPoolExecutor(sum(entry.parallel for entry in self._config.teachers)) as pool:
                try:
                    for unit in self._units():
                        self._advance(unit)
                        self._work(pool)
                    while self._queue or self._running:
                        self._work(pool)
                        self._settle()
                finally:
                    # Requests under way are paid for: they are waited for, their replies kept.
                    self._ended.set()
        finally:
            self._take_what_came()
            self._write()

    def _units(self) -> Iterator[Unit]:
        config = self._config
        for entry in read_pages(config, self._tell):
            if isinstance(entry, Quarantined):
                self.tally.rejected.append(Rejected(entry.origin, entry.reason))
                continue
            wanted = [task for task in config.tasks if task.scope in entry.scopes]
            tasks = [task for task in wanted if (entry.page_id, task.name) not in self._seen]
            if wanted and not tasks:
                self.tally.num_copies += 1
            if not tasks:
                continue
            if self.tally.num_pages == self._limit:
                return
            self.tally.num_pages += 1
            self._order.setdefault(entry.page_id, len(self._order))
            for task in tasks:
                self._seen.add((entry.page_id, task.name))
                for teacher in config.teachers:
                    for sampling in range(teacher.samples):
                        unit = unit_of(config, entry, task, teacher, sampling)
                        self.tally.num_known += self._log.known(unit.key, 0) is not None
                        yield unit

    def _advance(self, unit: Unit) -> None:
        """Take the unit's label from what is known, or queue what has to be asked next."""
        question = Question(unit)
        answer = self._log.known(unit.key, 0)
        if answer is not None:
            try:
                return self._keep(unit, _value(unit, answer), repaired=False)
            except Unfit as error:
                if not error.mendable:
                    return self._reject(unit, f"the answer cannot be used: {error}")
                question = Question(unit, answer.text, str(error))
            answer = self._log.known(unit.key, 1)
        if answer is None:
            self._queue.append(question)
            return None
        try:
            self._keep(unit, _value(unit, answer), repaired=True)
        except Unfit as error:
            self._reject(unit, f"the answer cannot be used, nor its repair: {error}")

    def _work(self, pool: ThreadPoolExecutor) -> None:
        """Send what is queued, as room comes."""
        while self._queue:
            if self._has_room(self._queue[0]):
                question = self._queue.popleft()
                self._running[pool.submit(self._ask, question)] = question
            else:
                self._settle()

    def _has_room(self, question: Question) -> bool:
        """Whether a question may be sent now; raises LabellingStopped where none ever may."""
        teacher = question.unit.teacher
        busy = sum(other.unit.teacher.name == teacher.name for other in self._running.values())
        if busy >= teacher.parallel:
            return False
        budget, spent = self._config.budget, self._log.account.total
        if budget.max_tokens is None and budget.max_cost is None:
            return True
        part = (teacher.name, question.unit.task.name)
        if part not in self._log.account.largest and self._running:
            return False  # one at a time, until it is known what a question takes
        held = [self._expected(other) for other in (*self._running.values(), question)]
        tokens = spent.tokens + sum(sum(entry) for entry in held)
        cost = spent.cost + sum(
            other.unit.teacher.cost(*entry) or 0.0
            for other, entry in zip((*self._running.values(), question), held, strict=True)
        )
        over = [
            f"budget.max_{what}={limit}: {used:,.{digits}f} are spent"
            for what, limit, used, wanted, digits in (
                ("tokens", budget.max_tokens, spent.tokens, tokens, 0),
                ("cost", budget.max_cost, spent.cost, cost, 4),
            )
            if limit is not None and wanted > limit
        ]
        if over and not self._running:
            raise LabellingStopped(
                f"{'; '.join(over)}, and the next answer might go beyond; raise the budget and run "
                "the same command again to go on"
            )
        return not over

    def _expected(self, question: Question) -> tuple[int, int]:
        """The most tokens that a question may read and write, by the largest one before it."""
        task = question.unit.task
        largest = self._log.account.largest.get((question.unit.teacher.name, task.name), 0)
        return largest + question.attempt * task.max_tokens, task.max_tokens

    def _ask(self, question: Question) -> Answer:
        """Send a request and keep every reply to it; in a thread."""

        def read(reply: Any) -> Answer:
            answer = self._log.append(question, reply)
            if answer.text is None:
                raise ValueError("the reply is no chat completion")
            return answer

        body = request_of(question, self._config)
        return self._servers[question.unit.teacher.name].ask(body, read)

    def _settle(self) -> None:
        """Wait for a reply, if any is to come, and go on with it."""
        if not self._running:
            return
        for done in wait(self._running, return_when=FIRST_COMPLETED).done:
            self._take(done)

    def _take_what_came(self) -> None:
        """The replies that came after the run was ended by an error; it may be one of many."""
        for done, question in self._running.items():
            if done.done() and done.exception() is None:
                self.tally.num_asked += 1
                self._advance(question.unit)

    def _take(self, done: Future[Answer]) -> None:
        question = self._running.pop(done)
        unit, error = question.unit, done.exception()
        if error is None:
            self._failed_in_a_row[unit.teacher.name] = 0
            self.tally.num_asked += 1
            self._check_usage(unit.teacher, done.result())
            self._advance(unit)
        elif isinstance(error, ImageError):
            self._reject(unit, error.message)
        elif isinstance(error, NoAnswer):
            self.tally.num_unanswered += 1
            self._note_failure(unit, f"no answer: {error}", LabellingStopped)
        elif isinstance(error, Refused) and error.status in OF_THE_PAGE:
            self._note_failure(unit, error.message, EvaluationError)
        else:
            raise error

    def _note_failure(
        self, unit: Unit, why: str, kind: type[LabellingStopped | EvaluationError]
    ) -> None:
        """Leave a unit to the next run; raises `kind` where the server fails all of them."""
        name = unit.teacher.name
        self._reject(unit, why)
        self._failed_in_a_row[name] += 1
        if self._failed_in_a_row[name] >= STOP_AFTER:
            raise kind(
                f"teacher {name}: the last {STOP_AFTER} requests failed, the latest: "
                f"{why}; run the same command again to go on"
            )

    def _check_usage(self, teacher: Teacher, answer: Answer) -> None:
        budget = self._config.budget
        if budget.max_tokens is None and budget.max_cost is None:
            return
        if answer.input_tokens is None or answer.output_tokens is None:
            raise EvaluationError(
                f"teacher {teacher.name}: its replies do not say how many tokens they took, so "
                "that budget cannot be kept; leave budget out"
            )

    def _keep(self, unit: Unit, value: Any, repaired: bool) -> None:
        page = unit.page
        images = self._folder.keep_images(page)
        self._results.append(
            Result(
                page.page_id,
                page.origin,
                page.group_id,
                images,
                unit.task.name,
                unit.teacher.name,
                unit.sampling,
                value,
                repaired,
            )
        )

    def _reject(self, unit: Unit, why: str) -> None:
        names = (unit.task.name, unit.teacher.name, unit.sampling)
        self.tally.rejected.append(Rejected(unit.page.origin, visible(why), *names))

    def _tell(self, done: int, total: int) -> None:
        spent = self._log.account.total
        cost = f", {spent.cost:.4f} spent" if spent.cost else ""
        words = f"{self.tally.num_pages:,} pages, {len(self._results):,} answers{cost}"
        self._progress(done, total, words)

    def _write(self) -> None:
        """Everything that is made from the answers, in the order of pages, tasks and teachers."""
        tasks = {task.name: place for place, task in enumerate(self._config.tasks)}
        teachers = {entry.name: place for place, entry in enumerate(self._config.teachers)}
        self._results.sort(
            key=lambda result: (
                self._order[result.page],
                tasks[result.task],
                teachers[result.teacher],
                result.sampling,
            )
        )
        tally = self.tally
        tally.num_results = len(self._results)
        tally.num_labels = self._folder.write_results(self._config, self._results, tally.rejected)
        write_json(self._folder.root / "cost.json", self._log.account.to_json())

    def _pause(self, seconds: float) -> None:
        """Wait before a further try; there is none once the run ends."""
        if self._ended.wait(seconds):
            raise NoAnswer("the run ended before the next try")


def reasons(rejected: list[Rejected]) -> list[tuple[str, int]]:
    """The first reason of each kind and how many there are, the most frequent first."""
    kinds = Counter(Quarantined(entry.origin, entry.reason, "").kind for entry in rejected)
    first: dict[str, str] = {}
    for entry in rejected:
        first.setdefault(Quarantined(entry.origin, entry.reason, "").kind, entry.reason)
    return [(first[kind], count) for kind, count in kinds.most_common()]


def _value(unit: Unit, answer: Answer) -> Any:
    return read_answer(answer.text or "", answer.truncated, unit.task.answer_schema)
