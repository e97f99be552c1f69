"""A few greedy tokens inside the pause, while every request of a user stays frozen: does this
engine answer as it should?

Runs in EngineCore, between pause and resume, where an ordinary request would wait for the resume.
The scheduler's queues are swapped for empty ones, the probes are stepped to its end, and everything
is put back. Equal checksums prove nothing (packed copies of weights live outside the parameters),
nor does the agreement of replicas that switched the same way: so the expected tokens come from a
cold load.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hotweights.adapters.vllm import releases
from hotweights.adapters.vllm.errors import CommitError

DEFAULT_PROMPTS = ((1, 2, 3, 5, 8, 13, 21, 34, 55, 89), tuple(range(40, 72)), (97, 3, 61, 14))
"""What golden tokens are recorded for, and what an engine is asked at boot: so the first commit's
batch is none that it never saw, for which libraries would look for kernels inside the pause.
"""
DEFAULT_LENGTH = (
    # prefill and decode run other kernels; each token is a step in the pause, a further prompt
    # costs nearly nothing
    2
)
SECONDS = 30.0
RECORD_SECONDS = 1800.0
"""The same where gaps are asked for: a kernel is compiled for them first, and nobody waits for it in
a pause.
"""
_PREFIX = "hotweights-probe-"
_numbers = itertools.count()


class ProbeError(RuntimeError):
    """The engine could not answer at all."""


def engine_kind(vllm_config: Any) -> str:
    """What golden tokens depend on besides the weights: numerics differ between these. For example
    ``vllm 0.32.0 cpu float32``; builds of one release (behind a ``+``) count as equal.
    """
    import vllm

    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    device = vllm_config.device_config.device_type
    kind = f"vllm {vllm.__version__.split('+')[0]} {device} {dtype}"
    size = vllm_config.parallel_config.tensor_parallel_size
    return kind if size == 1 else f"{kind} tp{size}"


def run(
    core: Any, prompts: Sequence[Sequence[int]], lengths: Sequence[int], *, gaps: bool = False
) -> list[dict[str, Any]]:
    """Greedy tokens for every prompt, all in one batch: a step of the model costs the pause about
    as much for one as for all. Prompts are token ids, ``lengths`` the tokens to answer to each;
    gives ``{"tokens", "nan", "gaps"}`` for each, in their order. With ``gaps``, never inside a
    pause, it says for each token how far the second best logit lay behind it; else that is empty.
    In EngineCore's busy loop, as one of its utility calls. Raises `ProbeError`.

    It steps as ``EngineCore`` of vLLM 0.32 does itself (``v1/engine/core.py``: ``step_fn``, then
    ``post_step``).
    """
    seconds = RECORD_SECONDS if gaps else SECONDS
    deadline = time.monotonic() + seconds
    with _alone(core.scheduler):
        answers = {
            _ask(core, prompt, length, gaps=gaps): Answer(length)
            for prompt, length in zip(prompts, lengths, strict=True)
        }
        while any(len(answer.tokens) < answer.length for answer in answers.values()):
            if time.monotonic() > deadline:
                raise ProbeError(f"no answer within {seconds:.0f} s")
            for output in _step(core):
                if answer := answers.get(output.request_id):
                    answer.tokens += output.new_token_ids
                    answer.nan = answer.nan or output.num_nans_in_logits > 0
                    answer.gaps += _gaps(output.new_logprobs)
        # let the workers forget the last of them
        while core.scheduler.has_requests() and time.monotonic() < deadline:
            _step(core)
        return [
            {
                "tokens": answer.tokens[: answer.length],
                "nan": answer.nan,
                "gaps": answer.gaps[: answer.length],
            }
            for answer in answers.values()
        ]


@dataclass(slots=True)
class Answer:
    """What one prompt got so far."""

    length: int
    tokens: list[int] = field(default_factory=list)
    nan: bool = False
    gaps: list[float] = field(default_factory=list)  # of each token, where they were asked for


def _ask(core: Any, prompt: Sequence[int], length: int, *, gaps: bool) -> str:
    """Queue one prompt; its request's name."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    name = f"{_PREFIX}{next(_numbers)}"
    # No logprobs in a pause, though they would show a NaN: the first request for them compiles a
    # kernel, half a minute inside it.
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        logprobs=2 if gaps else None,  # the token's own, and of the one behind it
    )
    # What a probe asked before may lie in the prefix cache, computed with the same weights: it
    # would answer without having run the prompt.
    sampling.skip_reading_prefix_cache = True
    core.scheduler.add_request(
        Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            # as EngineCore itself does: the cache asks for a hash of each full block (16 tokens on
            # a GPU, 128 on a CPU), and a request without them kills the step
            block_hasher=core.request_block_hasher,
        )
    )
    return name


def _gaps(logprobs: Any) -> list[float]:
    """How far the second best logit lay behind the best, token by token. A difference of logprobs
    is one of logits: what divides them is the same. vLLM 0.32 puts the sampled token before the
    best ones (``v1/outputs.py``: ``LogprobsLists``).
    """
    if logprobs is None:
        return []
    return [float(row[1] - row[2]) for row in logprobs.logprobs]


def _step(core: Any) -> list[Any]:
    # None: with a queue of batches a step may only have sent one off
    outputs, executed = core.step_fn()
    core.post_step(executed)
    return [output for batch in (outputs or {}).values() for output in batch.outputs]


def watch_for_nan(model_runner: Any, on: bool) -> None:
    """Let a rank count NaN in its logits, which costs a little per step: so only from a copy to the
    end of its pause. In the rank's process. vLLM 0.32 asks ``vllm.envs`` in every step
    (``v1/worker/gpu_model_runner.py``), or its sampler's ``compute_nans``
    (``v1/worker/gpu/sample/sampler.py``).
    """
    import vllm.envs

    # an attribute in the module hides the lazily read variable behind it
    name = "VLLM_COMPUTE_NANS_IN_LOGITS"
    if on:
        setattr(vllm.envs, name, True)
    else:
        vars(vllm.envs).pop(name, None)
    sampler: Any = getattr(model_runner, "sampler", None)
    if hasattr(sampler, "compute_nans"):  # the newer model runner asks only once, at start
        sampler.compute_nans = on or bool(getattr(vllm.envs, name))


@contextmanager
def _alone(scheduler: Any) -> Iterator[None]:
    """The scheduler with nothing but probes, unpaused, and afterwards as it was."""
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.request_queue import create_request_queue

    queues = {name: getattr(scheduler, name) for name in releases.api().scheduler_queues}
    running, state = scheduler.running, scheduler.pause_state
    try:
        scheduler.running = []
        for name in queues:
            setattr(scheduler, name, create_request_queue(scheduler.policy))
        # not by its setter, which would log two lines per commit
        scheduler._pause_state = PauseState.UNPAUSED
        yield
    finally:
        _drop_probes(scheduler)  # while the queues are still theirs
        scheduler.running = running
        for name, queue in queues.items():
            setattr(scheduler, name, queue)
        scheduler._pause_state = state


def _drop_probes(scheduler: Any) -> None:
    """A probe that was cut off must not go on living among the users' requests."""
    from vllm.v1.request import RequestStatus

    left = [name for name in scheduler.requests if name.startswith(_PREFIX)]
    if left:
        scheduler.finish_requests(left, RequestStatus.FINISHED_ABORTED)


@dataclass(frozen=True, slots=True)
class ProbePrompts:
    """Prompts, and the tokens that the right weights answer first (None: whatever comes, if only it
    comes without NaN). ``lengths`` may be longer than that: what comes after is not compared,
    because it hangs on a near tie (`golden`).
    """

    prompts: list[list[int]]
    lengths: list[int]
    tokens: list[list[int]] | None = None

    @classmethod
    def default(cls) -> ProbePrompts:
        """Where no golden tokens are known: only NaN, or no answer, is wrong."""
        return cls([*map(list, DEFAULT_PROMPTS)], [DEFAULT_LENGTH] * len(DEFAULT_PROMPTS))

    @classmethod
    def from_table(cls, probes: list[dict[str, Any]]) -> ProbePrompts:
        """A version's golden probes for this kind of engine, or the default prompts where there is
        nothing to compare. Raises KeyError, TypeError or ValueError for a table that is none.
        """
        read = [
            (
                [int(token) for token in item["promptTokenIds"]],
                [int(token) for token in item["tokenIds"]],
            )
            for item in probes
        ]
        asked = [(prompt, tokens) for prompt, tokens in read if tokens]
        if not asked:
            return cls.default()
        return cls(
            [prompt for prompt, _ in asked],
            # one that was cut before its second token runs the kernels of decoding all the same
            [max(len(tokens), DEFAULT_LENGTH) for _, tokens in asked],
            [tokens for _, tokens in asked],
        )


def right_tokens(answers: list[dict[str, Any]], questions: ProbePrompts) -> list[list[int]]:
    """The tokens by which the probe was judged, if they are the right ones: what a later probe of
    the same weights must answer too. Raises `CommitError` (ProbeMismatch).
    """
    tokens = [list(answer["tokens"]) for answer in answers]
    if any(answer["nan"] for answer in answers):
        raise CommitError("ProbeMismatch", "the probe ran into NaN")
    if questions.tokens is None:
        return tokens
    for number, expected in enumerate(questions.tokens):
        answered = tokens[number][: len(expected)]
        if answered != expected:
            # 16 tokens show where they part, and leave the message readable
            message = f"probe {number} answered {answered[:16]}, expected {expected[:16]}"
            raise CommitError("ProbeMismatch", message)
    return [list(expected) for expected in questions.tokens]
