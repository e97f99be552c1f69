"""The switch from one version to the next, all ranks or none, and the way back when it breaks.

The order is the whole point. Everything that can be refused is refused before the pause. Inside it:
copy, probe, label, resume; no allocation, no file, no agent. From the first copied byte until the
probe has passed, the engine is torn: whatever goes wrong there makes it *dirty*, and a dirty engine
is never resumed. It stays paused, says so, and is repaired to what it served before, confirmed by
the same kind of probe; if that does not succeed in time the process ends itself, and the restarted
container goes through the boot barrier.

`committed` is said in one place, after every rank and the probe have confirmed. Nothing here knows
sockets or frames' order: `server` does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hotweights.adapters.vllm import errors, probe
from hotweights.adapters.vllm.errors import CommitError, EngineDead
from hotweights_transports.handoff import frames

if TYPE_CHECKING:
    from hotweights.adapters.vllm.engine_client import EngineClient

logger = logging.getLogger("vllm.hotweights.commit")
REPAIR_ATTEMPTS = 2  # within ``repair_seconds`` together
RESUME_SECONDS = 10.0  # of the commit's deadline nothing may be left, and the weights are right
# for what is as good when it is done later: who waits for it keeps an agent waiting
TIDY_SECONDS = 2.0
PAUSE_MODES = ("Keep", "Wait", "Abort")  # vLLM's ``PauseMode``, as custom resources spell it


@dataclass(slots=True)
class Switch:
    """What this engine serves, and how it changes. One commit at a time. All of it runs on the
    API server's event loop; the link's thread reads fields for its hello.
    """

    engine_client: EngineClient
    repair_seconds: float
    """For a whole repair, all attempts together."""
    tell: Callable[[frames.State], None]
    """Says a state to the agent, if there is one; never raises."""
    end: Callable[[str], None] = lambda reason: errors.end_process(reason)
    state: str = "Booting"
    """``Booting``, ``Serving`` or ``Dirty``, as the hello says it."""
    digest: str | None = None
    """What was confirmed in this process' life; None: what it booted."""
    token: int = 0
    """The highest commit token seen: a lower one is of the past."""
    dirty: bool = False
    torn: bool = (
        # from the first copied byte until a probe has passed; nobody may take such a process' end
        # for a success
        False
    )
    probed: str = "None"
    """What proved ``digest``: ``Golden``, ``Ran`` or ``None``. It goes with it: a commit that broke
    changes neither.
    """
    _before: str = "Booting"  # the state that a repair returns to
    _running: tuple[str, int, asyncio.Future[frames.Frame]] | None = None
    # what each version answered when it was right
    _known: dict[str | None, probe.ProbePrompts] = field(default_factory=dict)

    async def remember_boot(self) -> None:
        """What the booted weights answer: they came from a cold load, so a repair of them can be
        checked against it. Raises `EngineDead`.
        """
        questions = probe.ProbePrompts.default()
        # as in a pause: on a GPU the kernel that counts NaN is compiled when it is first asked for,
        # which took the first commit's pause 0.7 to 2.9 s (H200)
        await self._quietly("watch", True)
        try:
            answers = await self.engine_client.probe(questions.prompts, questions.lengths)
        except EngineDead:
            raise
        except Exception as error:  # noqa: BLE001 - the engine serves all the same; only a repair will know less
            logger.warning("The booted weights could not be probed (%s)", error)
            return
        finally:
            await self._quietly("watch", False)
        self._known[None] = probe.ProbePrompts(
            questions.prompts, questions.lengths, [item["tokens"] for item in answers]
        )

    async def freeze(self) -> None:
        """Before the port opens: make later collections of garbage short."""
        await self._quietly("freeze")

    def keep(self, token: int) -> bool:
        """Go on serving what is served; False: the order is older than one that came before."""
        if token < self.token:
            return False
        self.token = token
        return True

    async def commit(self, frame: frames.Commit) -> frames.Frame:
        """Switch to a prepared version; the answer to send (`frames.Committed` or
        `frames.CommitFailed`). Raises `EngineDead`, after ``end`` was called.
        """
        running = self._running
        # the same order: its first two fields, before the future
        if running is not None and running[:2] == (frame.digest, frame.commit_token):
            return await asyncio.shield(running[2])  # asked again, by an agent that came back
        refusal = self._refusal(frame)
        if refusal is not None:
            return refusal
        self.token = frame.commit_token  # even if it fails: what is older stays refused
        if frame.digest == self.digest:  # it is served already: an agent that forgot asks so
            return self._committed(frame, 0.0, {})
        future: asyncio.Future[frames.Frame] = asyncio.get_running_loop().create_future()
        self._running = (frame.digest, frame.commit_token, future)
        try:
            result = await self._commit(frame)
        except EngineDead as error:
            future.cancel()  # whoever asked a second time hears that there is no answer
            self.end(f"the engine died during a commit: {error}")
            raise
        # only outside the pause: inside it, everything is caught and means dirty
        except Exception as error:
            logger.exception("Unexpected error before the pause")
            result = _failed(frame, "CommitFailed", f"{type(error).__name__}: {error}")
        finally:
            self._running = None
        future.set_result(result)
        return result

    def _refusal(self, frame: frames.Commit) -> frames.Frame | None:
        # the past first: it must not learn anything else than that it is the past
        if frame.commit_token < self.token:
            return _failed(
                frame,
                "StaleToken",
                f"token {frame.commit_token} is older than {self.token}, seen already",
            )
        if self.dirty:
            return _failed(
                frame,
                "EngineDirty",
                "the engine is being repaired; commit again when it serves",
                dirty=True,
            )
        if self._running is not None:
            return _failed(
                frame,
                "Busy",
                f"{self._running[0]} is being committed; try again when that has ended",
            )
        if frame.mode not in PAUSE_MODES:
            return _failed(
                frame, "CommitFailed", f"mode {frame.mode!r} is none of {', '.join(PAUSE_MODES)}"
            )
        return None

    async def _commit(self, frame: frames.Commit) -> frames.Frame:
        """Check, pause, copy and probe, open; in this order (see the module)."""
        timings: dict[str, float] = {}
        try:
            questions = await self._check(frame)
        except CommitError as error:
            await self._quietly("unpin")  # the ranks that said yes, or whose yes was lost
            return _failed(frame, error.reason, str(error))
        began = time.monotonic()
        try:
            await self._pause(frame, timings)
        except CommitError as error:
            try:
                await asyncio.wait_for(self.engine_client.resume(), TIDY_SECONDS)
            except EngineDead:
                raise
            except TimeoutError:
                # it does one thing after the other: the resume comes after the pause, if either does
                logger.warning("The engine does not answer; it resumes when it has paused")
            except Exception as failure:
                # paused, and nobody knows for how long: a repair ends the pause, or the process
                logger.exception("The engine does not resume")
                message = f"{error}; and it does not resume: {failure}"
                return await self._became_dirty(frame, error.reason, message)
            await self._quietly("unpin")
            return _failed(frame, error.reason, str(error))
        # draining has a limit of its own (`_pause`); any other pause counts against the deadline
        left = frame.deadline_seconds - (0.0 if frame.mode == "Wait" else time.monotonic() - began)
        self.torn = True  # before the first byte is copied: `server` looks at it when vLLM ends
        try:
            # A time-out of at least a little: once begun, the copy decides between committed and
            # dirty.
            tokens = await asyncio.wait_for(
                self._switch(frame, questions, timings), max(left, 0.001)
            )
            self.torn = False
            # the weights are right by now: this has a limit of its own
            with _timed(timings, "resume"):
                await asyncio.wait_for(self.engine_client.open(frame.digest), RESUME_SECONDS)
        except EngineDead:
            raise
        except TimeoutError:
            return await self._became_dirty(
                frame, "CommitFailed", f"not finished within {frame.deadline_seconds} s"
            )
        except CommitError as error:
            return await self._became_dirty(frame, error.reason, str(error))
        # between the copy and the resume, any error whatsoever means dirty
        except Exception as error:
            logger.exception("Unexpected error inside the pause")
            return await self._became_dirty(
                frame, "CommitFailed", f"{type(error).__name__}: {error}"
            )
        # only now: until the engine was open again an exception meant dirty, and the old digest
        self.digest = frame.digest
        self.probed = "Golden" if questions.tokens is not None else "Ran"
        self._known[frame.digest] = probe.ProbePrompts(questions.prompts, questions.lengths, tokens)
        pause_seconds = time.monotonic() - began
        await self._quietly("settle")  # after the resume: giving memory back takes time
        logger.info(
            "Committed %s: paused for %.1f ms, %s", frame.digest[:19], pause_seconds * 1e3, timings
        )
        return self._committed(frame, pause_seconds, timings)

    async def _check(self, frame: frames.Commit) -> probe.ProbePrompts:
        """Every rank has it; from here until the copy no rank lets go of it. Gives what to probe.
        Raises `CommitError`; some ranks may have said yes by then.
        """
        limit = frame.deadline_seconds
        try:
            answers = await asyncio.wait_for(self._ask_ranks(frame.digest), limit)
        except TimeoutError:
            message = f"the ranks did not answer within {limit} s; nothing was changed"
            raise CommitError("CommitFailed", message) from None
        except (CommitError, EngineDead):
            raise
        # a call that fails on its way back, for instance: nothing was copied yet
        except Exception as error:
            raise CommitError("CommitFailed", f"could not ask the ranks: {error}") from error
        if len(answers) != self.engine_client.world_size:
            raise CommitError(
                "NotPrepared", f"{len(answers)} ranks answered of {self.engine_client.world_size}"
            )
        try:
            # all ranks have the same table, so the first speaks for all
            return probe.ProbePrompts.from_table(answers[0]["probes"])
        except (KeyError, TypeError, ValueError) as error:
            raise CommitError(
                "CommitFailed", f"the version's probes are malformed: {error!r}"
            ) from error

    async def _ask_ranks(self, digest: str) -> list[dict[str, Any]]:
        if await self.engine_client.asleep():
            raise CommitError(
                "Busy", "the engine sleeps, with its weights out of memory: wake it (POST /wake_up)"
            )
        return await self.engine_client.ranks("check", digest)

    async def _pause(self, frame: frames.Commit, timings: dict[str, float]) -> None:
        """Raises `CommitError`; the caller resumes, because the pause may have begun."""
        limit = frame.drain_seconds if frame.mode == "Wait" else frame.deadline_seconds
        with _timed(timings, "pause"):
            try:
                await asyncio.wait_for(self.engine_client.pause(frame.mode), limit)
            except TimeoutError:
                if frame.mode == "Wait":
                    message = f"requests were still running after {limit} s; nothing was changed"
                    raise CommitError("DrainTimeout", message) from None
                message = f"the engine did not pause within {limit} s; nothing was changed"
                raise CommitError("CommitFailed", message) from None
            except EngineDead:
                raise
            # a cache that cannot be reset, for instance: nothing was copied yet
            except Exception as error:
                raise CommitError("CommitFailed", f"could not pause: {error}") from error

    async def _switch(
        self, frame: frames.Commit, questions: probe.ProbePrompts, timings: dict[str, float]
    ) -> list[list[int]]:
        """What only the pause may see: the copy, and the probe's tokens. ``timings`` are in
        seconds; the copy is measured in EngineCore, and the way there counts as the probe's.
        """
        with _timed(timings, "probe"):
            answers, copy_seconds = await self.engine_client.switch(
                frame.digest, questions.prompts, questions.lengths
            )
        timings |= {
            "copy": round(copy_seconds, 6),
            "probe": round(timings["probe"] - copy_seconds, 6),
        }
        return probe.right_tokens(answers, questions)

    async def _ask(self, questions: probe.ProbePrompts) -> list[list[int]]:
        return probe.right_tokens(
            await self.engine_client.probe(questions.prompts, questions.lengths), questions
        )

    async def _became_dirty(self, frame: frames.Commit, reason: str, message: str) -> frames.Frame:
        # a commit in the boot barrier fails too: then the repair leads back into it
        self._before, self.dirty, self.state = self.state, True, "Dirty"
        logger.error("The engine is dirty and stays paused: %s: %s", reason, message)
        self._tell(reason, message)
        return _failed(frame, reason, message, dirty=True)

    async def repair(self) -> None:
        """Back to what was served before, or the end of this process. Called after the failure has
        been answered.
        """
        began = time.monotonic()
        error: BaseException | None = None
        for _ in range(REPAIR_ATTEMPTS):
            # a second attempt begins even when the first has used up the time: it ends at once
            left = self.repair_seconds - (time.monotonic() - began)
            try:
                await asyncio.wait_for(self._repair(), max(left, 0.001))
            # whatever it was: the only other way out is the end of the process
            except Exception as failure:
                logger.exception("Repairing failed")
                error = failure
                if isinstance(failure, EngineDead):
                    break  # there is nobody left to ask a second time
            else:
                logger.warning("Repaired: serving %s again", self.digest or "what was booted")
                self._tell("Repaired", f"repaired in {time.monotonic() - began:.1f} s")
                return
        self.end(f"not repaired after {time.monotonic() - began:.1f} s: {error!r}")

    async def _repair(self) -> None:
        """One attempt. The old weights first, then what was computed with the wrong ones, then the
        proof; only after it the name, and requests last.
        """
        # again: a resume that was given up may have come to pass, and no request may see the copy
        await self.engine_client.pause("Keep")
        await self.engine_client.ranks("repair", self.digest)
        await self.engine_client.forget_caches()
        await self._ask(self._known.get(self.digest) or probe.ProbePrompts.default())
        await self._quietly("settle")
        await self.engine_client.label(self.digest or "booted")
        await self.engine_client.resume()
        # last: an engine that did not resume is repaired once more, and no commit gets between
        self.dirty, self.torn, self.state = False, False, self._before

    async def _quietly(self, command: str, argument: Any = None) -> None:
        """Tidying up: what it could not do, the next prepare does. What takes longer than
        `TIDY_SECONDS` is done after this has returned.
        """
        try:
            await asyncio.wait_for(self.engine_client.ranks(command, argument), TIDY_SECONDS)
        except EngineDead:
            raise
        except TimeoutError:
            logger.warning("The ranks take their time to %s", command)
        except Exception as error:  # noqa: BLE001 - it must not turn a commit that happened into one that did not
            logger.warning("A rank could not %s: %s", command, error)

    def _tell(self, reason: str, message: str) -> None:
        # cut, here and in `_failed`: an exception's text has no limit, and a frame has one
        message = message[:2000]
        self.tell(frames.State(self.state, self.digest, self.token, reason, message, self.probed))

    def _committed(
        self, frame: frames.Commit, pause_seconds: float, timings: dict[str, float]
    ) -> frames.Committed:
        return frames.Committed(
            frame.id, frame.digest, frame.commit_token, pause_seconds, timings, self.probed
        )


def _failed(
    frame: frames.Commit, reason: str, message: str, *, dirty: bool = False
) -> frames.CommitFailed:
    return frames.CommitFailed(
        frame.id, frame.digest, frame.commit_token, reason, message[:2000], dirty
    )


class _timed:  # noqa: N801 - reads as a word
    def __init__(self, timings: dict[str, float], step: str) -> None:
        self._timings, self._step = timings, step

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._timings[self._step] = round(time.monotonic() - self._began, 6)
