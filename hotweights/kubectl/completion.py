"""Completion: kubectl's convention for plugins, and scripts for shells.

kubectl asks an executable ``kubectl_complete-hotweights`` in the PATH what could follow, with the
words typed so far, the last one unfinished (https://kubernetes.io/docs/tasks/extend-kubectl/kubectl-plugins).
It answers one word a line, and at the end a directive of cobra: 4, no file names. The scripts here
ask the same executable, for those who type ``kubectl-hotweights``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hotweights.kubectl.options import Place
from hotweights_common.errors import HotweightsError
from hotweights_kube.client import Selection
from hotweights_kube.resources import NAMESPACES, WEIGHT_ROLLOUTS, WEIGHT_VERSIONS, Resource

NO_FILES = ":4"
SECONDS = 3.0
"""Nobody waits longer behind a Tab."""

_BASH = """\
_kubectl_hotweights() {
    local IFS=$'\\n'
    COMPREPLY=($(kubectl_complete-hotweights "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | sed '/^:/d'))
}
complete -F _kubectl_hotweights kubectl-hotweights
"""
_ZSH = """\
#compdef kubectl-hotweights
_kubectl_hotweights() {
    local -a found
    found=("${(@f)$(kubectl_complete-hotweights "${(@)words[2,CURRENT]}" 2>/dev/null | sed '/^:/d')}")
    compadd -- $found
}
compdef _kubectl_hotweights kubectl-hotweights
"""
_FISH = """\
function __kubectl_hotweights
    set -l typed (commandline -opc) (commandline -ct)
    kubectl_complete-hotweights $typed[2..-1] 2>/dev/null | string match -v ':*'
end
complete -c kubectl-hotweights -f -a '(__kubectl_hotweights)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="For which shell.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the script as a member of one JSON object.")
    ] = False,
) -> None:
    """Print a script that completes kubectl-hotweights in a shell.

    Behind kubectl no script is needed: kubectl's own completion asks kubectl_complete-hotweights, which is installed with this.

    Example: source <(kubectl hotweights completion bash)
    """
    from hotweights.kubectl import options

    if as_json:
        options.tell({"shell": shell, "script": SCRIPTS[shell]})
    else:
        print(SCRIPTS[shell], end="")


def main() -> None:
    """Entry point of the script ``kubectl_complete-hotweights``."""
    for word in candidates(sys.argv[1:]):
        print(word)
    print(NO_FILES)


def candidates(words: Sequence[str]) -> list[str]:
    """What could follow: ``words`` are those typed so far, the last one unfinished, perhaps empty."""
    from hotweights.kubectl.app import app

    *typed, begun = words or ("",)
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verb = next((word for word in typed if word in commands), None)
    if verb is None:
        return sorted(name for name in commands if name.startswith(begun))
    parameters = commands[verb].params
    options = {flag: p for p in parameters for flag in p.opts if flag.startswith("-")}
    if begun.startswith("-"):
        return sorted(flag for flag in options if flag.startswith(begun) and flag.startswith("--"))
    before = options.get(typed[-1])
    if before is not None and not before.is_flag:
        found = _values(typed[-1], before, typed)
    elif verb == "completion":
        found = list(SCRIPTS)
    else:
        found = _names(WEIGHT_ROLLOUTS, typed)
    return sorted(word for word in found if word.startswith(begun))


def _values(flag: str, option: Any, typed: Sequence[str]) -> list[str]:
    """What may follow an option."""
    if flag in ("-n", "--namespace"):
        return _names(NAMESPACES, typed)
    if flag == "--to":
        return _names(WEIGHT_VERSIONS, typed)
    return list(getattr(option.type, "choices", ()))


def _names(resource: Resource, typed: Sequence[str]) -> list[str]:
    """Of objects in the cluster that the words typed so far mean; none where it does not answer."""
    place = Place(
        _given(typed, "-n", "--namespace"),
        _given(typed, "--context"),
        Path(found) if (found := _given(typed, "--kubeconfig")) else None,
    )

    async def names() -> list[str]:
        async with asyncio.timeout(SECONDS), place.connected() as (api, namespace):
            listing = await api.list(resource, Selection(namespace))
            return [str(body["metadata"]["name"]) for body in listing.items]

    try:
        return asyncio.run(names())
    except (HotweightsError, TimeoutError):
        return []


def _given(typed: Sequence[str], *flags: str) -> str:
    """The value of an option among the words typed so far; empty: it is not there."""
    for index, word in enumerate(typed):
        flag, equals, value = word.partition("=")
        if flag in flags:
            return value if equals else next(iter(typed[index + 1 :]), "")
    return ""
