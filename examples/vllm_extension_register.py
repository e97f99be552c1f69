"""`HotweightsWorkerExtension` inside vLLM's workers, by ``worker_extension_cls``: every rank can be
told to fetch and apply a version.

    python examples/vllm_extension_register.py --model MODEL_DIR --next NEXT_DIR
    python examples/vllm_extension_register.py --model MODEL_DIR --use-coord --endpoint
    tcp://127.0.0.1:5555

vLLM mixes `HotweightsWorker` into its worker class, so that
``llm.collective_rpc("hotweights_apply")`` reaches it between two steps. The engine serves nothing
meanwhile, and ranks of one engine switch each for itself: this is for people who drive their engine
themselves. Who wants a bounded pause, a probe, and all ranks or none calls `install_autobind`
instead and changes nothing else.

Runs on the CPU build of vLLM too (in float32, eager).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
TOKENS = 8


class HotweightsWorker:
    """Mixed into vLLM's worker: it may have no constructor, and no name that the worker has."""

    def hotweights_apply(
        self, plan: bytes | None, endpoint: str, roots: list[str]
    ) -> dict[str, Any]:
        """On every rank: bring its model to a plan's version, or to the coordinator's."""
        from hotweights.adapters.vllm_extension import HotweightsWorkerExtension

        extension = getattr(self, "_hotweights_extension", None)
        if extension is None:
            extension = HotweightsWorkerExtension(
                endpoint=endpoint, roots=roots, device=self.device.type
            )  # type: ignore[attr-defined]
            extension.bind_module(self.model_runner.model, self.vllm_config)  # type: ignore[attr-defined]
            self._hotweights_extension = extension
        return dataclasses.asdict(extension.apply_update(plan))


def ask(llm: Any) -> list[int]:
    """What the model answers, greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return list(answer.outputs[0].token_ids)


def whole_plan(folder: Path) -> bytes:
    """The plan that brings all of a checkpoint, as `hotweights plan` without a previous manifest
    writes it.
    """
    from hotweights_planner import plan as plans
    from hotweights_storage.resolve import publish
    from hotweights_storage.sources.file import open_folder

    with open_folder(folder) as source:
        return plans.build(publish(source, "example", "next"), None, source.uri).canonical


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint to start with")
    parser.add_argument("--next", type=Path, help="the checkpoint to change to")
    parser.add_argument(
        "--use-coord", action="store_true", help="take the version from a coordinator instead"
    )
    parser.add_argument(
        "--endpoint", default="tcp://127.0.0.1:5555", help="where it is (default: %(default)s)"
    )
    parser.add_argument(
        "--root", type=Path, action="append", help="folders that the coordinator's plans may name"
    )
    arguments = parser.parse_args()
    if arguments.use_coord == bool(arguments.next):
        parser.error("give either --next or --use-coord")
    from vllm import LLM

    llm = LLM(
        str(arguments.model.resolve()),
        dtype="float32",
        enforce_eager=True,  # on CPUs a compiled model keeps its old weights
        max_model_len=128,
        worker_extension_cls=f"{Path(__file__).stem}.{HotweightsWorker.__name__}",
    )
    print(f"Before: {ask(llm)}")
    plan = None if arguments.use_coord else whole_plan(arguments.next)
    roots = [str(folder.resolve()) for folder in arguments.root or [arguments.next or Path()]]
    for rank, applied in enumerate(
        llm.collective_rpc("hotweights_apply", args=(plan, arguments.endpoint, roots))
    ):
        print(
            f"Rank {rank} applied: {applied['version']} ({applied['digest'][:19]}), "
            f"{applied['nbytes']} bytes"
        )
    llm.reset_prefix_cache()  # what was computed with the old weights
    print(f"After:  {ask(llm)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
