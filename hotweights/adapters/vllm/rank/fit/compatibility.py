"""Asks a rank's own loaders whether a version fits (`dry_load` has the rules), and hands its
tensors over as a cold load would see them.

What the engine booted from is the measure: its headers are read once, at start-up, and run through
the loaders without data. Where that is not possible (weights that were not safetensors, a loader
that needs values) fewer questions are asked, and the first of them still is: do the loaders take
every tensor.

One thing is settled here because no loader can: tied embeddings. A cold load decides from the
checkpoint whether ``lm_head`` is a tensor of its own (vLLM 0.32: ``maybe_untie_word_embeddings`` in
``config/model.py``, and after loading ``model_loader/weight_tying.py``); a running model has already
decided. Embeddings are known by the kind of their layer, as there: no name is common to all models.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hotweights.adapters.vllm.rank.fit import delta, dry_load
from hotweights.adapters.vllm.rank.fit.delta import Delta
from hotweights.adapters.vllm.rank.fit.dry_load import DoesNotFit, Spec, Trace
from hotweights.adapters.vllm.rank.fit.side_files import SideFiles
from hotweights.adapters.vllm.rank.image import Image

logger = logging.getLogger("vllm.hotweights.compatibility")
HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")  # as Llama's and GPT-2's kin call theirs


class Compatibility:
    """What this rank takes. Built on the worker's main thread; all else runs on the thread that
    prepares, and but for `check` and `delta` on the main thread in a repair, too.
    """

    def __init__(self, vllm_config: Any, shadow: Any) -> None:
        """``shadow`` is a `Shadow` that stays a skeleton: nothing is loaded into it. None: the
        loaders cannot be asked.
        """
        self._config = vllm_config
        self._shadow = shadow
        config = vllm_config.model_config
        folder = boot_folder(config)
        self._side_files = SideFiles(folder, own_tokenizer=config.tokenizer == config.model)
        self._boot = dry_load.read_checkpoint(folder, str(vllm_config.load_config.load_format))
        self._asking = threading.Lock()  # there is one skeleton
        self._boot_trace = self._ask(self._boot) if self._boot else None
        self._expected = self._expect()
        self._tied = frozenset() if shadow is None else shadow.tied()
        self._head, self._embedding = self._find_head() or ("", "")
        self._traces: dict[str | None, Trace | None] = {None: self._boot_trace}
        self._latest: tuple[list[tuple[str, Spec]], Trace | None] | None = None
        self._groups = {} if shadow is None else shadow.groups()
        self._alone: dict[str, dict[Delta, bool]] = {}  # by version

    @property
    def proven(self) -> bool:
        """Whether what passes `check` fills as much as the boot did, because that is known."""
        return bool(self._boot)

    def check(self, image: Image) -> DoesNotFit | None:
        """Why it does not fit; None when it does. Cheap questions come first: shapes and kinds of
        numbers by the headers, then the loaders.
        """
        specs = image.specs
        misfit = self._side_files.check(
            image.table.files, image.table.texts
        ) or dry_load.check_specs(specs, self._boot, self._boot_trace)
        if misfit is not None:
            return misfit
        specs = self._with_head(specs)
        trace = self._traces[image.digest] = self._ask_once(specs)
        if trace is None:
            return dry_load.check_names(specs, self._boot) if self._boot else None
        return dry_load.check_trace(specs, self._boot, trace, self._expected) or self._check_tied(
            image, trace
        )

    def filled(self, digest: str | None) -> dict[str, int] | None:
        """The parameters and buffers that a version fills, and how many elements each gets; None:
        not known. ``digest`` None is what the engine booted from.
        """
        trace = self._traces.get(digest)
        if trace is None or trace.failed is not None or trace.opaque:
            return None
        return trace.by_parameter()

    def delta(self, image: Image, served: Image | None) -> Delta | None:
        """What of a checked version is to be done where ``served`` is what the model holds; None:
        all of it.
        """
        trace = self._traces.get(image.digest)
        changed = None if served is None else image.changed_from(served)
        if trace is None or changed is None or not self._groups:
            return None
        if self._lacks_head(image.specs) and self._embedding in changed:
            changed |= {self._head}  # it is loaded from the same bytes
        return delta.between(
            changed, self._names(image), trace, self._groups, self._unexplained(trace)
        )

    def parts(self, image: Image, within: Delta | None) -> tuple[Delta, ...]:
        """What of a checked version, or ``within`` a part of it, can be finished by itself, in any
        order. Empty: it has no such parts.
        """
        trace = self._traces.get(image.digest)
        if trace is None or not self._groups:
            return ()
        return delta.parts(
            self._names(image), trace, self._groups, self._unexplained(trace), within
        )

    def stands_alone(self, image: Image, part: Delta) -> bool:
        """Whether the loaders do the same with a part's tensors alone as among all of them, by
        asking them; once for each part.
        """
        trace = self._traces.get(image.digest)
        answers = self._alone.setdefault(image.digest, {})
        if part not in answers:
            specs = self._with_head(image.specs)
            alone = self._ask({name: spec for name, spec in specs.items() if name in part.tensors})
            answers[part] = (
                trace is not None
                and alone is not None
                and delta.stands_alone(part, trace, alone, self._groups)
            )
        return answers[part]

    def _names(self, image: Image) -> Collection[str]:
        return self._with_head(image.specs).keys()

    def _unexplained(self, trace: Trace) -> frozenset[str]:
        filled: frozenset[str] = self._shadow.fillable() if self._shadow else frozenset()
        return filled - trace.sources.keys()

    def keep_only(self, digests: Collection[str]) -> None:
        """Forget what was found out about others."""
        for digest in self._traces.keys() - digests - {None}:
            del self._traces[digest]
        for digest in self._alone.keys() - digests:
            del self._alone[digest]

    def tensors(
        self, image: Image, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Names and tensors (whole, on the CPU) in load order, the head that a cold load would tie
        among them. ``only``: those of these names. As in a cold load, each is the loaders' own:
        what they write into one they find in no other, and in no later load.
        """
        trace = self._traces.get(image.digest)
        if trace is not None and trace.complete:
            copied: Collection[str] = trace.changed
        else:
            # nobody knows what they write into; a copy of everything might find no room
            image.restore()
            copied = image.shared() | {self._embedding}  # which may be the head as well
        lacks_head = self._lacks_head(image.specs)
        wanted = only
        if only is not None and self._head in only:
            wanted = {*only, self._embedding}
        for name, tensor in image.tensors(wanted):
            if only is None or name in only:
                yield name, tensor.clone() if name in copied else tensor
            if lacks_head and name == self._embedding and (only is None or self._head in only):
                yield self._head, tensor.clone() if self._head in copied else tensor

    def _ask_once(self, specs: dict[str, Spec]) -> Trace | None:
        """What loaders do depends on names, dtypes, shapes and their order, and one version after
        the other has the same. Asking takes a tenth of a second of the interpreter for 500 tensors,
        while it serves.
        """
        asked = list(specs.items())
        if self._latest is None or self._latest[0] != asked:
            self._latest = asked, self._ask(specs)
        return self._latest[1]

    def _ask(self, specs: dict[str, Spec]) -> Trace | None:
        if self._shadow is None:
            return None
        with self._asking:
            trace: Trace = self._shadow.trace(specs)
        if trace.unable:
            logger.info(
                "A loader needs data to say what fits (%s): names and shapes are compared instead",
                trace.error,
            )
            return None
        return trace

    def _expect(self) -> dict[str, int]:
        """Elements that each parameter must get: as many as at boot, because padding is filled by
        no checkpoint.
        """
        if self._boot_trace is not None and self._boot_trace.failed is None:
            return self._boot_trace.by_parameter()
        # Nothing to measure by: every parameter must at least get something. Where a checkpoint was
        # read and its trace was not possible or failed, nothing is expected.
        return (
            dict.fromkeys(self._shadow.parameters(), 1)
            if self._shadow is not None and not self._boot
            else {}
        )

    def _with_head(self, specs: dict[str, Spec]) -> dict[str, Spec]:
        return {**specs, self._head: specs[self._embedding]} if self._lacks_head(specs) else specs

    def _lacks_head(self, specs: dict[str, Spec]) -> bool:
        """Whether a cold load of it would tie a head that this engine booted with."""
        has_head = any(name.endswith(HEAD) for name in specs)
        return bool(self._head) and not has_head and self._embedding in specs

    def _find_head(self) -> tuple[str, str] | None:
        """The tensor of the head, and that of the embeddings which a cold load would take for it:
        where this engine booted with a head, and its configuration says that they are tied.
        """
        config = self._config.model_config
        # vLLM 0.32 puts it so when the checkpoint has a head; earlier ones leave the configuration
        says_tied = getattr(config, "word_embeddings_untied_by_checkpoint", False) or getattr(
            config.hf_text_config, "tie_word_embeddings", False
        )
        if not says_tied or self._shadow is None or self._boot_trace is None:
            return None
        copied = self._boot_trace.copied
        heads = [name for name in copied if name.endswith(HEAD) and copied[name]]
        embeddings = [
            name
            for name in copied
            if name not in heads and self._shadow.embeddings() & copied[name].keys()
        ]
        # with several of them vLLM ties none
        return (heads[0], embeddings[0]) if len(heads) == len(embeddings) == 1 else None

    def _check_tied(self, image: Image, trace: Trace) -> DoesNotFit | None:
        """Where the running model uses its embeddings as its head too, a head in a version must
        equal them, whether the loaders ignore it (built as tied) or take it (tied after loading).
        """
        heads = [entry.name for entry in image.table.entries if entry.name.endswith(HEAD)]
        embeddings = [
            name
            for name, parameters in trace.copied.items()
            if name not in heads and self._tied & parameters.keys()
        ]
        for head in heads if embeddings else ():
            if not any(image.same_bytes(name, head) for name in embeddings):
                message = (
                    f"{head} differs from {embeddings[0]}, but the running model has them tied: "
                    "restart it with this version"
                )
                return DoesNotFit("UnknownTensor", message)
        return None


def boot_folder(model_config: Any) -> Path:
    """Where the engine's checkpoint lies: the folder that it was started with, or, for a name on
    the Hub, what was fetched of it. A path that is no folder where it was not.
    """
    model = str(model_config.model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache  # every vLLM has it

    # asks the disk alone
    found = try_to_load_from_cache(model, "config.json", revision=model_config.revision)
    return Path(found).parent if isinstance(found, str) else Path(model)
