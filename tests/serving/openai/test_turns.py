"""Requests get turns at the pace of the engine's steps, in order, and none waits for a step that will not come."""

import asyncio

from deepseek_jax.serving.openai.turns import Turns


async def settled():
    """Waits until all tasks that are ready have run."""
    for _ in range(4):
        await asyncio.sleep(0)


async def waiting(turns, count):
    """(tasks that each take a turn, the growing list of those that had one)."""
    had = []

    async def one(i):
        await turns.take()
        had.append(i)

    tasks = [asyncio.create_task(one(i)) for i in range(count)]
    await settled()
    return tasks, had


def test_between_two_steps_as_many_are_let_in_as_the_engine_has_slots_in_order():
    async def work():
        turns = Turns(3)
        _, had = await waiting(turns, 8)
        assert had == [0, 1, 2]
        await asyncio.to_thread(turns.renew)
        await settled()
        assert had == [0, 1, 2, 3, 4, 5]
        await asyncio.to_thread(turns.renew)
        await settled()
        assert had == list(range(8))
        _, more = await waiting(turns, 2)
        assert more == [0]  # one of three was left

    asyncio.run(work())


def test_turns_that_nobody_takes_are_not_saved_up():
    async def work():
        turns = Turns(2)
        await turns.take()
        for _ in range(5):
            turns.renew()
        await settled()
        assert (await waiting(turns, 5))[1] == [0, 1]

    asyncio.run(work())


def test_a_turn_given_back_is_the_next_ones_and_one_who_left_costs_none():
    async def work():
        turns = Turns(1)
        tasks, had = await waiting(turns, 4)
        tasks[1].cancel()
        await settled()
        turns.give_back()
        await settled()
        assert had == [0, 2]

    asyncio.run(work())


def test_after_the_last_step_nobody_waits():
    async def work():
        turns = Turns(1)
        _, had = await waiting(turns, 5)
        await asyncio.to_thread(turns.end)
        await settled()
        assert had == list(range(5))
        turns.renew()  # may come late
        assert (await waiting(turns, 5))[1] == list(range(5))

    asyncio.run(work())
