"""Runs blocking work, such as a backup, in a thread, with progress reports in the event loop and cancellation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from mesh_storage.backup import Progress, Report, checked_report

T = TypeVar("T")


async def in_thread(work: Callable[[Report], T], progress: Report | None) -> T:
    """Run work that reports its progress; an exception raised by `progress` stops it.

    If this task is cancelled, the work is stopped at its next report and awaited, so that nothing keeps running
    unnoticed.
    """
    call = checked_report(progress)
    loop = asyncio.get_running_loop()
    cancelled = threading.Event()

    async def pass_on(made: Progress) -> None:
        call(made)

    def report(made: Progress) -> None:
        if cancelled.is_set():
            raise asyncio.CancelledError
        if progress is not None:
            asyncio.run_coroutine_threadsafe(pass_on(made), loop).result()

    working = asyncio.ensure_future(asyncio.to_thread(work, report))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        cancelled.set()
        while not working.done():
            # If cancelled again meanwhile, keep waiting: the work is stopping already.
            try:
                await asyncio.wait([working])
            except asyncio.CancelledError:
                continue
        if not working.cancelled():
            working.exception()  # retrieved, so that asyncio does not log it
        raise
