"""kopf without the rest of the operator."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import aiohttp

from hotweights_operator.runtime import handlers
from hotweights_operator.runtime.informers import Informers


@asynccontextmanager
async def kopf_running(
    informers: Informers, listen: Callable[[], None]
) -> AsyncGenerator[asyncio.Task[None], None]:
    """kopf as the operator runs it. It leaves tasks and sessions behind when it is ended, and
    another test would hear of them.
    """
    tasks, sessions = asyncio.all_tasks(), set(map(id, _open_sessions()))
    kopf = asyncio.create_task(handlers.run_kopf(informers, listen))
    try:
        yield kopf
    finally:
        kopf.cancel()
        rest = asyncio.all_tasks() - tasks
        await asyncio.gather(kopf, return_exceptions=True)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for left in _open_sessions():
            if id(left) not in sessions:
                await left.close()


def _open_sessions() -> list[aiohttp.ClientSession]:
    found = [one for one in gc.get_objects() if type(one) is aiohttp.ClientSession]
    return [one for one in found if not one.closed]
