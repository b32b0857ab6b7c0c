"""The greenlets in which sync code waits for the event loop: used again, with nothing left of the call before."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from contextvars import ContextVar

import pytest
from greenlet import getcurrent
from sqlalchemy.util import await_

from mesh_storage.aio import greenlets

REQUEST: ContextVar[str] = ContextVar("request")


class Argument:
    """Something that a weak reference can be made to."""


async def later(value: object) -> object:
    await asyncio.sleep(0)
    return value


def test_one_serves_all_calls_that_follow_each_other() -> None:
    async def main() -> None:
        used = {await greenlets.run(getcurrent) for _ in range(10)}
        assert len(used) == 1
        assert used != {getcurrent()}

    asyncio.run(main())


def test_calls_that_wait_at_once_have_one_each_and_get_their_own_results() -> None:
    def call(number: int) -> tuple[object, object]:
        return await_(later(number)), getcurrent()

    async def main() -> None:
        for _ in range(3):
            results = await asyncio.gather(*(greenlets.run(call, number) for number in range(20)))
            assert [number for number, _ in results] == list(range(20))
            assert len({worker for _, worker in results}) == 20

    asyncio.run(main())


def test_the_context_is_the_callers() -> None:
    def call() -> tuple[str, str]:
        before = REQUEST.get()
        await_(later(None))
        return before, REQUEST.get()

    async def task(name: str) -> None:
        REQUEST.set(name)
        assert await greenlets.run(call) == (name, name)

    async def main() -> None:
        await asyncio.gather(*(task(f"request {number}") for number in range(5)))

    asyncio.run(main())
    asyncio.run(main())


def test_what_is_raised_on_either_side_comes_to_the_other() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("outside")

    def call() -> None:
        try:
            await_(fail())
        except LookupError:
            await_(later(None))
            raise ValueError("inside") from None

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(ValueError, match="inside"):
                await greenlets.run(call)
        assert await greenlets.run(await_, later(1)) == 1

    asyncio.run(main())


def test_a_cancelled_call_may_clean_up_and_its_greenlet_goes_on() -> None:
    cleaned = []

    def call(begun: asyncio.Event) -> None:
        begun.set()
        try:
            await_(asyncio.sleep(3600))
        finally:
            cleaned.append(await_(later("cleaned")))

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(greenlets.run(call, begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == ["cleaned"]
        assert await greenlets.run(await_, later(2)) == 2

    asyncio.run(main())


def test_nothing_of_a_call_is_kept() -> None:
    def fail(_argument: Argument) -> None:
        raise ValueError

    async def main() -> list[weakref.ref[Argument]]:
        given, failed = Argument(), Argument()
        assert await greenlets.run(lambda same: same, given) is given
        with pytest.raises(ValueError):  # noqa: PT011 - nothing else raises
            await greenlets.run(fail, failed)
        return [weakref.ref(given), weakref.ref(failed)]

    kept = asyncio.run(main())
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_each_thread_has_its_own() -> None:
    used = []

    def in_thread() -> None:
        used.append(asyncio.run(greenlets.run(getcurrent)))

    in_thread()
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert used[0] is not used[1]


def test_those_of_a_thread_end_with_it() -> None:
    made: list[weakref.ref[object]] = []

    async def main() -> None:
        async def one() -> None:
            made.append(weakref.ref(await greenlets.run(lambda: (await_(later(None)), getcurrent())[1])))

        await asyncio.gather(*(one() for _ in range(10)))

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    thread.join()
    gc.collect()
    assert len(made) == 10
    assert [each() for each in made] == [None] * 10


def test_those_of_a_thread_end_with_it_though_an_error_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[object] = []
    errors: list[Exception] = []

    def fail() -> None:
        raise ZeroDivisionError

    def in_thread() -> None:
        try:
            asyncio.run(greenlets.run(fail))
        except ZeroDivisionError as error:
            errors.append(error)

    monkeypatch.setattr(sys, "unraisablehook", lambda complaint: complaints.append(complaint.exc_value))
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert len(errors) == 1
    errors.clear()
    gc.collect()
    assert complaints == []
