"""A thin asynchronous face of the API server: plain dicts in and out, a deadline on every request,
own exceptions.

It uses the official client's configuration (kubeconfigs with all their ways to log in, a pod's
rotating token) and its HTTP layer, and none of its hundreds of generated models: custom resources
have none, and server-side apply wants exactly the fields that we mean. It refuses to know what the
objects mean, and it never retries: whoever asked knows whether the question still stands. This is
the only module that imports the ``kubernetes`` package, and only when it connects, because that
takes a second.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlencode

import aiohttp

from hotweights_kube import errors
from hotweights_kube.resources import Body, Resource, name_of

Method = Literal["GET", "POST", "PATCH", "DELETE"]

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"


@dataclass(frozen=True, slots=True)
class Listing:
    """A consistent list of objects, and the version of the collection from which a watch goes
    on.
    """

    items: list[Body]
    resource_version: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects of a collection are meant; the API server does the selecting."""

    namespace: str | None = None  # None: all namespaces
    label_selector: str = ""
    field_selector: str = ""

    def query(self) -> dict[str, str]:
        """As query parameters; what selects nothing is left out."""
        pairs = {"labelSelector": self.label_selector, "fieldSelector": self.field_selector}
        return {key: value for key, value in pairs.items() if value}


class Api:
    """One API server, as one identity. An asynchronous context manager; `connect` makes one.

    Every method that asks something raises a `KubeError`: `Unavailable` when nobody answers within
    ``timeout_seconds``, else what `errors.from_response` makes of the answer. It may be used again
    after any of them. For one event loop, any number of tasks.
    """

    def __init__(self, configuration: Any, *, timeout_seconds: float, user_agent: str) -> None:
        from kubernetes.aio.client.rest import RESTClientObject

        self._configuration = configuration
        self._rest = RESTClientObject(configuration)
        self._timeout_seconds = timeout_seconds
        self._user_agent = user_agent

    @classmethod
    async def connect(
        cls,
        kubeconfig: Path | None = None,
        *,
        context: str | None = None,
        timeout_seconds: float = 15.0,
        user_agent: str = "hotweights",
    ) -> Self:
        """By the kubeconfig given, else ``KUBECONFIG``, else the pod's service account, else
        ~/.kube/config.

        Nothing is asked of the API server yet, so this works while it is away.
        """
        configuration = await _load_configuration(kubeconfig, context)
        return cls(configuration, timeout_seconds=timeout_seconds, user_agent=user_agent)

    @property
    def url(self) -> str:
        """The API server's base URL, for requests and messages."""
        return str(self._configuration.host)

    async def close(self) -> None:
        """Close all connections; requests on their way fail."""
        await self._rest.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def get(self, resource: Resource, name: str, namespace: str | None = None) -> Body:
        """One object as it is now. Raises `NotFound`."""
        return await self._ask("GET", resource.path(namespace, name))

    async def list(
        self, resource: Resource, selection: Selection | None = None, *, page_size: int = 500
    ) -> Listing:
        """All selected objects at once. What may be thousands of objects is read by `pages`."""
        items: list[Body] = []
        version = ""
        async with aclosing(self.pages(resource, selection, page_size=page_size)) as pages:
            async for page in pages:
                items += page.items
                version = page.resource_version
        return Listing(items, version)

    async def pages(
        self, resource: Resource, selection: Selection | None = None, *, page_size: int = 100
    ) -> AsyncGenerator[Listing, None]:
        """All selected objects, a page at a time; the next one is asked for when this one has been
        dealt with.

        All pages show the same moment. Items carry their kind, which the API server leaves out in
        lists. Raises `Expired` when the caller took so long that the API server has forgotten that
        moment.
        """
        selection = selection or Selection()
        query = {**selection.query(), "limit": str(page_size)}
        more = True
        while more:
            page = await self._ask("GET", resource.path(selection.namespace), query)
            metadata = page.get("metadata", {})
            kind = {"apiVersion": resource.api_version, "kind": resource.kind}
            items = [{**kind, **item} for item in page.get("items") or ()]
            listing = Listing(items, str(metadata.get("resourceVersion", "")))
            # the API server wants the same limit and selectors with it, and keeps it for minutes
            query["continue"] = metadata.get("continue") or ""
            more = bool(query["continue"])
            del page, items  # nothing of it is kept here while the next one is fetched
            yield listing
            del listing

    async def create(self, resource: Resource, body: Body, *, manager: str = "hotweights") -> Body:
        """Create the object; its namespace is the body's. Raises `AlreadyExists`."""
        path = resource.path(body.get("metadata", {}).get("namespace"))
        return await self._ask("POST", path, {"fieldManager": manager}, body, subject=name_of(body))

    async def apply(
        self,
        resource: Resource,
        body: Body,
        *,
        manager: str,
        force: bool = True,
        subresource: str | None = None,
    ) -> Body:
        """Server-side apply: afterwards ``manager`` owns exactly the fields in the body.

        A ``metadata.resourceVersion`` in the body fences: `Conflict` if the object has changed
        since. Without it nothing does, not even ``force=False`` against an older self.
        """
        metadata = body["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], subresource)
        query = {"fieldManager": manager, "force": "true" if force else "false"}
        full = {"apiVersion": resource.api_version, "kind": resource.kind, **body}
        return await self._ask("PATCH", path, query, full, content_type=APPLY)

    async def merge_patch(
        self,
        resource: Resource,
        name: str,
        patch: Body,
        *,
        namespace: str | None = None,
        subresource: str | None = None,
        resource_version: str = "",
        manager: str = "hotweights",
    ) -> Body:
        """Replace the named fields; None removes one. With a resourceVersion, `Conflict` if the
        object has changed since.
        """
        if resource_version:
            patch = {
                **patch,
                "metadata": {**patch.get("metadata", {}), "resourceVersion": resource_version},
            }
        path = resource.path(namespace, name, subresource)
        return await self._ask("PATCH", path, {"fieldManager": manager}, patch, content_type=MERGE)

    async def json_patch(
        self,
        resource: Resource,
        name: str,
        operations: Sequence[Body],
        *,
        namespace: str | None = None,
        subresource: str | None = None,
        manager: str = "hotweights",
    ) -> Body:
        """RFC 6902 operations in one write; a failed ``test`` raises `Invalid`."""
        path = resource.path(namespace, name, subresource)
        return await self._ask(
            "PATCH", path, {"fieldManager": manager}, list(operations), content_type=JSON_PATCH
        )

    async def delete(
        self, resource: Resource, name: str, *, namespace: str | None = None, uid: str = ""
    ) -> None:
        """Delete the object, in the background what it owns. With a UID, only that very one (else
        `Conflict`).
        """
        body: Body = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        await self._ask("DELETE", resource.path(namespace, name), None, body)

    async def post(self, resource: Resource, body: Body) -> Body:
        """Create something that is not stored, such as a review, and get the answer."""
        return await self._ask("POST", resource.path(), None, body)

    async def stream(
        self,
        resource: Resource,
        selection: Selection,
        query: Mapping[str, str],
        *,
        silence_seconds: float,
    ) -> AsyncGenerator[Body, None]:
        """The lines of one watch request as they come. `Unavailable` after ``silence_seconds``
        without a byte.
        """
        path = resource.path(selection.namespace)
        parameters = {**selection.query(), **query, "watch": "true"}
        timeout = aiohttp.ClientTimeout(
            total=None,
            connect=self._timeout_seconds,
            sock_connect=self._timeout_seconds,
            sock_read=silence_seconds,  # a watch has no end that could be waited for
        )
        request = f"watch {path}"
        try:
            response = await self._send("GET", path, parameters, None, JSON, timeout)
            try:
                if response.status >= HTTPStatus.BAD_REQUEST:
                    raise errors.from_response(
                        request, response.status, await response.read(), response.headers
                    )
                async for line in _lines(response.response.content):
                    yield json.loads(line)
            finally:
                response.response.close()  # not released: the rest of its lines must not be read
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise errors.Unavailable(
                f"{request} at {self.url} broke off: {_said(error)}. It is tried again"
            ) from error

    async def _ask(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        content_type: str = JSON,
        subject: str = "",
    ) -> Body:
        request = f"{method} {path} {subject}".rstrip()
        timeout = aiohttp.ClientTimeout(total=self._timeout_seconds)
        try:
            response = await self._send(method, path, query, body, content_type, timeout)
            content = await response.read()
        except TimeoutError as error:  # first: it is an OSError too
            raise errors.Unavailable(
                f"{request}: no answer from {self.url} within {self._timeout_seconds:g} s. It "
                "is tried again"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise errors.Unavailable(
                f"{request}: {self.url} is away: {_said(error)}. It is tried again"
            ) from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise errors.from_response(request, response.status, content, response.headers)
        try:
            answer: Body = json.loads(content)
        except ValueError as error:
            raise errors.Unavailable(
                f"{request}: {self.url} answered something else than JSON, is it an API "
                "server? It is tried again"
            ) from error
        return answer

    async def _send(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str] | None,
        body: Any,
        content_type: str,
        timeout: aiohttp.ClientTimeout,
    ) -> Any:
        headers = {"Accept": JSON, "Content-Type": content_type, "User-Agent": self._user_agent}
        # asked anew for each request: tokens are renewed
        for setting in (await self._configuration.auth_settings()).values():
            headers[setting["key"]] = setting["value"]
        url = self.url + path + (f"?{urlencode(query)}" if query else "")
        return await self._rest.request(
            method, url, headers=headers, body=body, _request_timeout=timeout
        )


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Lines of any length: a reader's own ``readline`` refuses those above its buffer."""
    rest = b""
    async for chunk in content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield line


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _load_configuration(kubeconfig: Path | None, context: str | None) -> Any:
    from kubernetes.aio import config
    from kubernetes.aio.client import Configuration

    configuration = type.__call__(Configuration)  # as the client's own loaders make one
    configuration.connection_pool_maxsize = 64
    home = Path.home() / ".kube" / "config"
    file = str(kubeconfig or os.environ.get("KUBECONFIG", ""))
    try:
        if not file and "KUBERNETES_SERVICE_HOST" in os.environ:
            await asyncio.to_thread(
                config.load_incluster_config, client_configuration=configuration
            )
        elif file or home.exists():
            await config.load_kube_config(
                file or str(home),
                context=context,
                client_configuration=configuration,
                persist_config=False,  # the kubeconfig is the user's; we write nothing into it
            )
        else:
            raise errors.NotConfigured(
                "no way to an API server: set KUBECONFIG to a kubeconfig file, or run in a "
                "pod with a service account"
            )
    except (config.ConfigException, OSError) as error:
        raise errors.NotConfigured(
            f"{file or 'the service account'} cannot be used: {error}"
        ) from error
    return configuration
