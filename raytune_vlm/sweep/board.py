"""The board: where jobs are put up, taken by executors, and reported on. A small Ray actor.

Proxies and the driver put jobs up and wait for reports; executors take jobs, push their progress
and learn whether to stop. A job that an executor held when it died is handed to it again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Any

import ray

from raytune_vlm.sweep.jobs import Job


class BoardState:
    """The board's logic, without Ray, so that it can be read and tested as a plain class."""

    def __init__(self, executors: list[str], max_failures: int) -> None:
        self._alive = set(executors)
        self._max_failures = max_failures
        self._queue: deque[Job] = deque()
        self._held: dict[str, Job] = {}
        self._stopped: set[str] = set()
        self._reports: dict[str, asyncio.Queue[dict[str, Any]]] = {}
        self._progress: dict[str, dict[str, Any]] = {}
        self._closed = False
        self._changed = asyncio.Event()

    async def submit(self, job: Job) -> None:
        """Put a job up."""
        self._channel(job.job_id)
        if not self._alive:
            self._fail(job, "no executor is alive")
            return
        self._queue.append(job)
        self._changed.set()

    async def take(self, executor: str) -> Job | None:
        """The next job; None when the board is closed. Waits for one.

        An executor that asks while it still holds a job has died with it in between: it gets the
        job again, until `max_failures` is used up.
        """
        held = self._held.pop(executor, None)
        if held is not None:
            self._retry(held, "its worker died")
        while not self._closed:
            if self._queue:
                job = self._queue.popleft()
                self._held[executor] = job
                return job
            self._changed.clear()
            await self._changed.wait()
        return None

    async def push(self, executor: str, job_id: str, progress: dict[str, Any]) -> bool:
        """Note an executor's progress; True if the job shall stop."""
        self._progress[executor] = {"job_id": job_id, **progress}
        return job_id in self._stopped or self._closed

    async def report(self, job_id: str, report: dict[str, Any]) -> None:
        """Hand a result to whoever waits for the job."""
        self._channel(job_id).put_nowait(report)

    async def finish(self, executor: str, job_id: str) -> None:
        """The executor is done with the job, whatever came of it."""
        self._held.pop(executor, None)
        self._progress.pop(executor, None)

    async def next_report(self, job_id: str) -> dict[str, Any]:
        """The next result of a job; waits for it."""
        return await self._channel(job_id).get()

    async def stop(self, job_id: str) -> None:
        """Ask the executor of a job to stop at its next step; take it down if nobody has it."""
        self._stopped.add(job_id)
        self._queue = deque(job for job in self._queue if job.job_id != job_id)

    async def abandon(self, executor: str, message: str) -> None:
        """An executor is gone for good; its job goes to another one, or fails."""
        self._alive.discard(executor)
        self._progress.pop(executor, None)
        held = self._held.pop(executor, None)
        if held is not None:
            self._retry(held, message)
        if not self._alive:
            while self._queue:
                self._fail(self._queue.popleft(), message)

    async def status(self) -> dict[str, dict[str, Any]]:
        """Executor -> what it does now."""
        return dict(self._progress)

    async def close(self) -> None:
        """Send the executors home."""
        self._closed = True
        self._changed.set()

    def _retry(self, job: Job, message: str) -> None:
        if job.job_id in self._stopped:
            return
        if job.attempt > self._max_failures:
            self._fail(job, f"{message} (attempt {job.attempt})")
            return
        self._queue.appendleft(replace(job, attempt=job.attempt + 1))
        self._changed.set()

    def _fail(self, job: Job, message: str) -> None:
        report = {"failed": "infrastructure", "message": message, "done": True}
        self._channel(job.job_id).put_nowait(report)

    def _channel(self, job_id: str) -> asyncio.Queue[dict[str, Any]]:
        return self._reports.setdefault(job_id, asyncio.Queue())


Board = ray.remote(num_cpus=0)(BoardState)
