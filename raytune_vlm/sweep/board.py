"""The board: where jobs are put up, taken by executors, and reported on. A small Ray actor.

Proxies and the driver put jobs up and wait for reports; executors take jobs, push their progress
and learn whether to stop. Jobs that an executor held when it died are handed out again, each alone:
whose fault it was shows then.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import ray

from raytune_vlm.config.sweep import MOST_SLOTS
from raytune_vlm.sweep.jobs import Job

IDLE = "idle"
"""What `take` gives when there was nothing to do for a while; ask again."""

Word = Literal["", "stop", "pause", "close", "leave", "alone"]
"""What is to be done with a job: go on; drop it; save it, because it is paused by hand, because the
run ends, or because the executor leaves its node (which it sees itself); leave it, because it does
not fit beside others (which the executor sees, too)."""


class Channel:
    """The reports of one job on their way to whoever waits for them, who may die on the way."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._last: dict[str, Any] | None = None
        self._asker: object = None
        self._changed = asyncio.Event()

    def put(self, report: dict[str, Any]) -> None:
        """A report has arrived."""
        self._waiting.append(report)
        self._changed.set()

    def repeat(self, job: Job) -> None:
        """A job was put up again: what was handed over last is again the next report, unless the
        job says that it is known: a proxy was killed in between."""
        last, self._last = self._last, None
        if last is not None and "step" in last and last["step"] not in job.reported:
            self._waiting.appendleft(last)

    async def get(self) -> dict[str, Any]:
        """The next report. A call of a proxy that was killed may still wait here: it must not take
        what the new one waits for."""
        mine = self._asker = object()
        self._changed.set()
        while self._asker is mine:
            if self._waiting:
                self._last = self._waiting.popleft()
                return self._last
            self._changed.clear()
            await self._changed.wait()
        return {}


class BoardState:
    """The board's logic, without Ray, so that it can be read and tested as a plain class."""

    def __init__(self, executors: list[str], max_failures: int) -> None:
        self._alive = set(executors)
        self._max_failures = max_failures
        self._queue: deque[Job] = deque()
        self._held: dict[str, dict[str, Job]] = {name: {} for name in executors}
        """Executor -> its jobs by their ids."""
        self._most = MOST_SLOTS
        self._num_ended = self._num_recovered = 0
        self._stopped: set[str] = set()
        self._paused: set[str] = set()
        self._again: dict[str, Job] = {}
        self._reports: dict[str, Channel] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._seen = {name: time.monotonic() for name in executors}
        self._moved: set[str] = set()
        self._asking: dict[str, object] = {}
        self._notes: list[str] = []
        self._noted: set[str] = set()
        self._closed = False
        self._halted: str | None = None
        self._changed = asyncio.Event()

    async def submit(self, job: Job) -> None:
        """Put a job up."""
        self._channel(job.job_id).repeat(job)
        if not self._alive:
            self._fail(job, "no executor is alive")
            return
        if job.job_id in self._paused | self._stopped:
            return  # asked for while its proxy was starting
        if any(job.job_id in held for held in self._held.values()):
            # Whoever has it has not left it yet: two must not train one trial.
            self._again[job.job_id] = job
            return
        self._queue = deque(other for other in self._queue if other.job_id != job.job_id)
        self._queue.append(job)
        self._changed.set()

    async def take(
        self, executor: str, wait_s: float | None = None, holding: Collection[str] = ()
    ) -> Job | str | None:
        """The next job; None when the board is closed; `IDLE` if there was none for `wait_s`.

        Jobs that were given to the executor and are not among those it says to be `holding` died
        with it in between: they are handed out again, until `max_failures` is used up. A job that
        died and has reported nothing since has its executor to itself.
        """
        self._alive.add(executor)
        # A call of a life that is over may still wait here: it must not take what the new one gets.
        mine = self._asking[executor] = object()
        held = self._held.setdefault(executor, {})
        for job_id in [job_id for job_id in held if job_id not in holding]:
            self._retry(held.pop(job_id), f"{executor}: its worker died")
        ends = None if wait_s is None else time.monotonic() + wait_s
        while not (self._closed or self._halted) and self._asking[executor] is mine:
            alone = any(job.attempt > 1 for job in held.values())
            full = len(held) >= self._most
            if self._queue and not full and not (held and (alone or self._queue[0].attempt > 1)):
                job = self._queue.popleft()
                held[job.job_id] = job
                return job
            self._changed.clear()
            try:
                left = None if ends is None else max(0.0, ends - time.monotonic())
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return IDLE
        return None

    async def limit_slots(self, most: int) -> None:
        """Give no executor more jobs than these at once, from now on."""
        self._most = most

    async def push(self, executor: str, job_id: str, progress: dict[str, Any]) -> Word:
        """Note an executor's progress; what it shall do."""
        self._progress[job_id] = {"executor": executor, **progress}
        if job_id in self._stopped:
            return "stop"
        if job_id in self._paused:
            return "pause"
        return "close" if self._closed or self._halted else ""

    async def report(self, job_id: str, report: dict[str, Any]) -> None:
        """Hand a result to whoever waits for the job. Failures are counted anew from here."""
        for executor, held in self._held.items():
            if job_id in held:
                held[job_id] = replace(held[job_id], attempt=1)
                self._moved.add(executor)
        self._channel(job_id).put(report)

    async def finish(self, executor: str, job_id: str) -> None:
        """The executor is done with the job, whatever came of it."""
        held = self._dropped(executor, job_id)
        self._moved.add(executor)
        self._num_ended += held is not None and held.kind == "trial"
        if job_id in self._again:
            self._queue.append(self._again.pop(job_id))
            self._changed.set()

    async def hand_back(
        self, executor: str, job_id: str, message: str, *, alone: bool = False
    ) -> None:
        """An executor leaves a job that is not done: nobody's failure.

        `alone`: whoever gets it next does nothing beside it until it has reported something.
        """
        self._moved.add(executor)
        self._notes.append(f"{executor}: {message}")
        held = self._dropped(executor, job_id)
        if held is not None and job_id not in self._stopped | self._paused:
            self._num_recovered += 1
            self._queue.appendleft(replace(held, attempt=2) if alone else held)
            self._changed.set()

    async def next_report(self, job_id: str) -> dict[str, Any]:
        """The next result of a job; waits for it. Whoever asked before gets nothing any more."""
        return await self._channel(job_id).get()

    async def stop(self, job_id: str) -> None:
        """Ask the executor of a job to stop at its next step; take it down if nobody has it."""
        self._stopped.add(job_id)
        self._again.pop(job_id, None)
        self._queue = deque(job for job in self._queue if job.job_id != job_id)

    async def pause(self, job_id: str) -> None:
        """Let the executor of a job save it and leave it; nobody gets it until `unpause`."""
        self._paused.add(job_id)
        self._again.pop(job_id, None)
        self._queue = deque(job for job in self._queue if job.job_id != job_id)

    async def unpause(self, job_id: str) -> None:
        """A job may be put up again; who has not left it yet goes on with it."""
        self._paused.discard(job_id)

    async def abandon(self, executor: str, message: str) -> None:
        """An executor is gone for good; its jobs go to another one, or fail."""
        self._alive.discard(executor)
        for job_id in list(self._held.get(executor, ())):
            self._retry(self._dropped(executor, job_id), message)
        if not self._alive:
            while self._queue:
                self._fail(self._queue.popleft(), message)

    async def give_up_waiting(self, executor: str) -> int:
        """An executor has no workers, and none will come: others get its jobs. Who is left."""
        others = self._alive - {executor}
        if others:
            await self.abandon(executor, f"{executor} has no workers")
        return len(others)

    async def status(self) -> dict[str, dict[str, Any]]:
        """Job -> who does it, and how far that is."""
        return dict(self._progress)

    async def here(self, executor: str) -> None:
        """A sign of life of an executor's worker, whatever it does."""
        self._seen[executor] = time.monotonic()

    async def absent(self) -> dict[str, float]:
        """Executor -> seconds since its last sign of life, of those that are counted on."""
        now = time.monotonic()
        return {name: now - seen for name, seen in self._seen.items() if name in self._alive}

    async def goes_on(self, executor: str) -> bool:
        """Whether an executor whose group ended is started anew.

        It is if it got anything done since this was last asked; else each time costs the jobs that
        it holds an attempt (whoever drives its workers may die too), and without one it is not.
        """
        if self._closed:
            return False
        if executor in self._moved:
            self._moved.discard(executor)
            return True
        held = list(self._held.get(executor, ()))
        for job_id in held:
            self._retry(self._dropped(executor, job_id), f"{executor}: its group ended")
        return bool(held)

    async def note(self, message: str) -> None:
        """Something that a person should read, once."""
        if message not in self._noted:
            self._noted.add(message)
            self._notes.append(message)

    async def notes(self) -> list[str]:
        """What was noted since this was last asked."""
        found, self._notes = self._notes, []
        return found

    async def counts(self) -> dict[str, int]:
        """How many executors are alive, slots are in use, trials are queued, running and ended, and
        jobs were handed out again."""
        return {
            "executors_alive": len(self._alive),
            "slots_in_use": sum(map(len, self._held.values())),
            "trials_queued": sum(job.kind == "trial" for job in self._queue),
            "trials_running": sum(
                job.kind == "trial" for held in self._held.values() for job in held.values()
            ),
            "trials_ended": self._num_ended,
            "recoveries": self._num_recovered,
        }

    async def halt(self, message: str) -> None:
        """End the run for want of something that no other trial would have either."""
        self._halted = self._halted or message
        self._changed.set()

    async def halted(self) -> str | None:
        """Why the run has to end, if it has."""
        return self._halted

    async def close(self) -> None:
        """Send the executors home."""
        self._closed = True
        self._changed.set()

    def _dropped(self, executor: str, job_id: str) -> Job | None:
        self._progress.pop(job_id, None)
        return self._held.get(executor, {}).pop(job_id, None)

    def _retry(self, job: Job | None, message: str) -> None:
        if job is None or job.job_id in self._stopped | self._paused:
            return
        if job.attempt > self._max_failures:
            self._fail(job, f"{message} (attempt {job.attempt})")
            return
        self._num_recovered += 1
        self._notes.append(f"{message}; {job.job_id} goes on, attempt {job.attempt + 1}")
        self._queue.appendleft(replace(job, attempt=job.attempt + 1))
        self._changed.set()

    def _fail(self, job: Job, message: str) -> None:
        self._num_ended += job.kind == "trial"
        report = {"failed": "infrastructure", "message": message, "done": True}
        self._channel(job.job_id).put(report)

    def _channel(self, job_id: str) -> Channel:
        return self._reports.setdefault(job_id, Channel())


def start_board(executors: list[str], max_failures: int) -> Any:
    """The board as an actor on the driver's own node: no other node's end takes it away."""
    home = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    return ray.remote(num_cpus=0, label_selector=home)(BoardState).remote(executors, max_failures)
