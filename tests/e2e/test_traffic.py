"""Clients notice what a user would: a refusal, an answer that breaks off, a stream that stands
still.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from e2e.harness import traffic as clients
from e2e.harness.traffic import Traffic, complete_ids

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """The address of something that answers completions like this."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{made.server_address[1]}"
    finally:
        made.shutdown()
        thread.join()
        made.server_close()


def choice(reason: str | None) -> bytes:
    return json.dumps({"choices": [{"token_ids": [1, 2], "finish_reason": reason}]}).encode()


def well(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """As vLLM answers; a stream stands still once."""
    handler.send_response(200)
    handler.end_headers()
    if not body["stream"]:
        handler.wfile.write(choice("length"))
        return
    handler.wfile.write(b"data: " + choice(None) + b"\n\n")
    time.sleep(0.1)
    handler.wfile.write(b"data: " + choice("length") + b"\n\ndata: [DONE]\n\n")


def busy(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_error(503)


def broken(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"data: " + choice(None) + b"\n\n" if body["stream"] else choice("abort"))


def ask(address: str) -> Traffic:
    """Clients of both kinds, until a few requests ended."""
    with Traffic([address], plain=1, streams=1) as traffic:
        while traffic.requests < 4:
            time.sleep(0.01)
    return traffic


def test_good_answers_are_counted_and_their_gaps_seen() -> None:
    with server(well) as address:
        assert complete_ids(address, [1]) == [1, 2]
        traffic = ask(address)
    assert traffic.failures == []
    assert traffic.answered == {address: traffic.requests}
    # as long as the server stood still, less what this client slept itself
    assert traffic.worst_gap() > 0.0
    assert traffic.worst_gap(until=0.0) == 0.0
    assert traffic.slowest_seconds >= 0.1


def test_every_kind_of_failure_is_kept() -> None:
    with server(busy) as address:
        traffic = ask(address)
        assert len(traffic.failures) == traffic.requests
        assert traffic.answered == {address: 0}
        assert "503" in traffic.failures[0]
    with server(broken) as address:
        told = " ".join(ask(address).failures)
    assert "ended with abort" in told
    assert "the stream broke off" in told
    with socket.socket() as bound:  # nobody listens there, and nobody else can
        bound.bind(("127.0.0.1", 0))
        assert "Error" in ask(f"127.0.0.1:{bound.getsockname()[1]}").failures[0]


def test_an_address_that_was_never_reached_is_told_apart() -> None:
    with server(well) as address, server(busy) as other, Traffic([address, other]) as traffic:
        while not traffic.answered[address]:
            time.sleep(0.01)
    assert traffic.answered[other] == 0
    assert traffic.requests > 0


def test_nobody_who_asks_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody asks"):
        Traffic([])


def test_a_client_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "END_SECONDS", 0.2)
    begun, over = threading.Event(), threading.Event()

    def hang(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        begun.set()
        over.wait(60)

    with server(hang) as address:
        try:
            with pytest.raises(TimeoutError, match=address), Traffic([address]) as traffic:
                assert begun.wait(30)
            assert traffic.failures == [f"{address}: no end within 0.2 s"]
        finally:
            over.set()


def odd(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
    """200, and nothing that a client looks for."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"choices": []}' if not body["stream"] else b'data: {"choices": []}\n\n')


def test_an_answer_that_nobody_can_read_is_a_failure_and_the_client_goes_on() -> None:
    with server(odd) as address:
        traffic = ask(address)
    assert len(traffic.failures) == traffic.requests
    assert any("IndexError" in failure for failure in traffic.failures)


def test_everybody_asks_once_however_short_it_is() -> None:
    with server(well) as address:
        with Traffic([address], plain=2, streams=1) as traffic:
            pass
        assert traffic.answered[address] >= 3


def test_an_error_inside_says_more() -> None:
    with server(odd) as address, pytest.raises(RuntimeError, match="inside"), Traffic([address]):
        raise RuntimeError("inside")
