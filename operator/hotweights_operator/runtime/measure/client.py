"""HTTP for measurements: JSON from an address that is allowed, within a time and a size.

It follows no redirects, keeps no cookies, takes no proxy from the environment and sends no
credentials: nothing but the request that somebody wrote leaves the operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import aiohttp
from yarl import URL

from hotweights_operator.runtime.measure.addresses import AddressRefused, Guard, Network

MAX_BYTES = 1 << 20
"""Of an answer: what one number needs, and a thousand times more."""
AT_ONCE = 16


class NoResult(Exception):
    """A measurement that gave nothing; it says why, for the status."""


class JsonClient:
    """One for a process; `close` it. For one event loop, any number of tasks."""

    def __init__(self, refused: tuple[Network, ...]) -> None:
        self._guard = Guard(refused)
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self, url: str, timeout_seconds: float, form: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """The answer's status and JSON: to a GET, or with ``form`` to a POST of it. Raises
        `NoResult`, also for a status of 300 or more whose body is no JSON.
        """
        try:
            target = URL(url)
            # an address is connected to without being resolved
            self._guard.check(target.host or "")
            async with self._connected().request(
                "POST" if form is not None else "GET",
                target,
                data=form,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=timeout_seconds),
            ) as response:
                return response.status, _parsed(url, response.status, await _body(response))
        except TimeoutError as error:
            raise NoResult(f"{_short(url)}: no answer within {timeout_seconds:g} s") from error
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, AddressRefused):
                raise NoResult(str(error.os_error)) from error
            raise NoResult(f"{_short(url)}: {error}") from error
        except AddressRefused as error:
            raise NoResult(str(error)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NoResult(f"{_short(url)}: {str(error) or type(error).__name__}") from error

    async def close(self) -> None:
        """Requests on their way fail."""
        if self._session is not None:
            await self._session.close()

    def _connected(self) -> aiohttp.ClientSession:
        # made by the first request: it belongs to the event loop that runs then
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=self._guard, limit=AT_ONCE),
                cookie_jar=aiohttp.DummyCookieJar(),
                # what is decompressed has no bound that could be known before
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "hotweights-operator"},
            )
        return self._session


async def _body(response: aiohttp.ClientResponse) -> bytes:
    found = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        found += chunk
        if len(found) > MAX_BYTES:
            response.close()  # not released: the rest must not be read
            raise NoResult(
                f"{_short(str(response.url))}: the answer is larger than {MAX_BYTES} bytes"
            )
    return bytes(found)


def _parsed(url: str, status: int, body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        what = f"status {status}" if status >= HTTPStatus.MULTIPLE_CHOICES else "no JSON"
        raise NoResult(f"{_short(url)}: {what}: {body[:80]!r}") from error


def _short(url: str) -> str:
    return url if len(url) <= 120 else f"{url[:119]}…"
