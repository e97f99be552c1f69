"""Users: streams and plain completions in loops, who notice every failed, shortened or stalled answer."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from typing import Any

from e2e.engine.launch import MODEL_NAME, VLLM


class Traffic:
    def __init__(self, vllm: VLLM, streams: int = 1, plain: int = 1, tokens: int = 40) -> None:
        self._vllm = vllm
        self._tokens = tokens
        self._stop = threading.Event()
        self.finished = 0
        self.failures: list[str] = []
        self.gaps: list[tuple[float, float]] = []  # (when, seconds between two tokens of one stream)
        self._threads = [threading.Thread(target=self._loop, args=(n, n < streams)) for n in range(streams + plain)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def worst_gap(self, since: float = 0.0, until: float = float("inf")) -> float:
        return max((gap for when, gap in self.gaps if since <= when <= until), default=0.0)

    def _loop(self, user: int, stream: bool) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            prompt = [(user * 37 + turn * 11 + position * 3) % 250 for position in range(12)]
            body = {
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": self._tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            try:
                reason = self._stream(body) if stream else self._plain(body)
            except OSError as error:
                reason = repr(error)
            if reason == "length":
                self.finished += 1
            else:
                self.failures.append(f"user {user}, turn {turn}: {reason}")
                time.sleep(0.2)

    def _plain(self, body: dict[str, Any]) -> str:
        return str(self._vllm.post("/v1/completions", body)["choices"][0]["finish_reason"])

    def _stream(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(f"{self._vllm.url}/v1/completions", data, headers)
        reason, last = "the stream ended early", time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    self.gaps.append((now, now - last))
                    last = now
                    reason = json.loads(line[6:])["choices"][0].get("finish_reason") or reason
        return reason
