"""The board's logic: jobs go round, stops arrive, dead executors' jobs come back."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from raytune_vlm.sweep.board import IDLE, BoardState
from raytune_vlm.sweep.jobs import Job

JOB = Job("t0000", "trial", "t0000", {"lora.rank": 4})


def play(scene):
    """Run a coroutine that gets a fresh board for two executors and one retry."""
    return asyncio.run(scene(BoardState(["a", "b"], 1)))


def test_jobs_are_taken_in_order_and_reported_to_who_waits():
    async def scene(board):
        other = replace(JOB, job_id="t0001")
        await board.submit(JOB)
        await board.submit(other)
        assert await board.take("a") == JOB
        assert await board.take("b") == other
        waiting = asyncio.create_task(board.next_report("t0001"))
        await board.report("t0001", {"step": 5})
        assert await waiting == {"step": 5}

    play(scene)


def test_take_waits_for_a_job_and_ends_when_the_board_closes():
    async def scene(board):
        taking = asyncio.create_task(board.take("a"))
        await asyncio.sleep(0)
        assert not taking.done()
        await board.submit(JOB)
        assert await taking == JOB
        await board.finish("a", JOB.job_id)
        idle = asyncio.create_task(board.take("a"))
        await asyncio.sleep(0)
        await board.close()
        assert await idle is None

    play(scene)


def test_a_stop_reaches_the_executor_and_takes_down_a_waiting_job():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        assert await board.push("a", JOB.job_id, {"step": 1}) == ""
        await board.stop(JOB.job_id)
        assert await board.push("a", JOB.job_id, {"step": 2}) == "stop"
        assert (await board.status())[JOB.job_id]["step"] == 2
        waiting = replace(JOB, job_id="t0009")
        await board.submit(waiting)
        await board.stop("t0009")
        await board.finish("a", JOB.job_id)
        await board.close()
        assert await board.take("a") is None

    play(scene)


def test_an_executor_that_died_with_a_job_gets_it_again_until_failures_are_used_up():
    async def scene(board):
        await board.submit(JOB)
        assert (await board.take("a")).attempt == 1
        assert (await board.take("a")).attempt == 2
        await board.submit(replace(JOB, job_id="t0001"))
        assert (await board.take("a")).job_id == "t0001"
        report = await board.next_report(JOB.job_id)
        assert report["failed"] == "infrastructure" and "attempt 2" in report["message"]

    play(scene)


def test_the_job_of_an_abandoned_executor_goes_to_another_one():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        await board.abandon("a", "a is gone")
        assert (await board.take("b")).attempt == 2

    play(scene)


def test_with_no_executor_alive_every_job_fails_instead_of_waiting_for_ever():
    async def scene(board):
        await board.submit(JOB)
        await board.abandon("a", "gone")
        await board.abandon("b", "gone")
        assert (await board.next_report(JOB.job_id))["failed"] == "infrastructure"
        late = replace(JOB, job_id="t0002")
        await board.submit(late)
        assert (await board.next_report("t0002"))["failed"] == "infrastructure"

    play(scene)


def test_a_node_that_announces_its_end_costs_the_job_no_attempt():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        await board.hand_back("a", JOB.job_id, "a node is about to go")
        assert (await board.take("b")).attempt == 1
        assert await board.goes_on("a") and not await board.goes_on("a")
        assert await board.notes() == ["a: a node is about to go"] and await board.notes() == []

    play(scene)


def test_a_job_that_did_not_fit_beside_others_waits_until_they_are_done():
    async def scene(board):
        other = replace(JOB, job_id="t0002")
        await board.submit(JOB)
        await board.submit(other)
        assert [(await board.take("a", 0.01, held)).job_id for held in ([], [JOB.job_id])] == [
            JOB.job_id,
            "t0002",
        ]
        await board.hand_back("a", JOB.job_id, "no memory", alone=True)
        await board.submit(replace(JOB, job_id="t0003"))
        assert await board.take("a", 0.01, ["t0002"]) == IDLE
        await board.finish("a", "t0002")
        assert (await board.take("a", 0.01, [])).job_id == JOB.job_id
        assert await board.take("a", 0.01, [JOB.job_id]) == IDLE
        await board.report(JOB.job_id, {"step": 4})
        assert (await board.take("a", 0.01, [JOB.job_id])).job_id == "t0003"

    play(scene)


def test_attempts_are_counted_anew_from_every_report():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        for _ in range(3):
            assert (await board.take("a")).attempt == 2
            await board.report(JOB.job_id, {"step": 4})
        assert await board.goes_on("a")

    play(scene)


def test_a_group_that_ends_before_any_report_is_started_anew_as_often_as_allowed():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        assert await board.goes_on("a") and not await board.goes_on("a")
        assert (await board.take("a")).attempt == 2
        # The allowance is used up: the job fails, the executor is there for others.
        assert await board.goes_on("a")
        assert (await board.next_report(JOB.job_id))["failed"] == "infrastructure"
        await board.submit(JOB)
        await board.take("a")
        await board.close()
        assert not await board.goes_on("a")

    play(scene)


def test_a_call_of_a_dead_life_takes_nothing_from_the_new_one():
    async def scene(board):
        stale = asyncio.create_task(board.take("a"))
        await asyncio.sleep(0)
        fresh = asyncio.create_task(board.take("a"))
        await asyncio.sleep(0)
        await board.submit(JOB)
        assert await fresh == JOB and await stale is None

    play(scene)


def test_an_idle_executor_asks_again_and_the_end_of_the_run_is_no_stop_of_the_trial():
    async def scene(board):
        assert await board.take("a", 0.01) == IDLE
        await board.submit(JOB)
        await board.take("a", 0.01)
        await board.halt("disk full")
        assert await board.push("a", JOB.job_id, {}) == "close"
        assert await board.halted() == "disk full" and await board.take("b") is None
        await board.stop(JOB.job_id)
        assert await board.push("a", JOB.job_id, {}) == "stop"

    play(scene)


def test_an_executor_without_workers_is_given_up_unless_it_is_the_last():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a")
        assert set(await board.absent()) == {"a", "b"}
        assert await board.give_up_waiting("a") == 1
        assert set(await board.absent()) == {"b"}
        assert (await board.take("b")).attempt == 2
        assert await board.give_up_waiting("b") == 0
        assert await board.counts() == {
            "executors_alive": 1,
            "slots_in_use": 1,
            "trials_queued": 0,
            "trials_running": 1,
            "trials_ended": 0,
            "recoveries": 1,
        }

    play(scene)


def test_trials_that_died_together_go_on_each_alone():
    async def scene(board):
        names = [f"t{number:04}" for number in range(4)]
        for name in names:
            await board.submit(replace(JOB, job_id=name))
        for number in range(3):
            assert (await board.take("a", 0.0, names[:number])).job_id == names[number]
        again = await board.take("a", 0.0)  # its worker died: it holds none of them any more
        assert again.attempt == 2
        assert await board.take("a", 0.0, [again.job_id]) == IDLE, "a suspect has neighbours"
        await board.report(again.job_id, {"step": 4})
        assert await board.take("a", 0.0, [again.job_id]) == IDLE, "a suspect is a neighbour"
        await board.finish("a", again.job_id)
        second = await board.take("a", 0.0)
        assert second.attempt == 2 and second.job_id != again.job_id
        await board.finish("a", second.job_id)
        third = await board.take("a", 0.0)
        await board.finish("a", third.job_id)
        assert {again.job_id, second.job_id, third.job_id} == set(names[:3])
        assert (await board.take("a", 0.0)).job_id == names[3]

    play(scene)


def test_a_suspect_that_has_reported_has_neighbours_again():
    async def scene(board):
        await board.submit(JOB)
        await board.take("a", 0.0)
        assert (await board.take("a", 0.0)).attempt == 2
        await board.submit(replace(JOB, job_id="t0001"))
        assert await board.take("a", 0.0, [JOB.job_id]) == IDLE
        await board.report(JOB.job_id, {"step": 4})
        assert (await board.take("a", 0.0, [JOB.job_id])).job_id == "t0001"

    play(scene)


def test_a_proxy_that_was_killed_has_taken_no_report_with_it():
    async def scene(board):
        job = replace(JOB, until=4)
        await board.submit(job)
        assert await board.take("a") == job
        for step in (4, 8):
            await board.report(JOB.job_id, {"step": step})
        assert (await board.next_report(JOB.job_id))["step"] == 4
        # It died with that in its hands, and the one in its place asks anew.
        await board.submit(job)
        assert (await board.next_report(JOB.job_id))["step"] == 4
        assert (await board.next_report(JOB.job_id))["step"] == 8
        # It died while it waited: its call still does.
        lost = asyncio.create_task(board.next_report(JOB.job_id))
        await asyncio.sleep(0)
        await board.submit(replace(job, reported=(4, 8)))
        found = asyncio.create_task(board.next_report(JOB.job_id))
        await asyncio.sleep(0)
        await board.report(JOB.job_id, {"step": 12})
        assert (await found)["step"] == 12 and await lost == {}

    play(scene)
