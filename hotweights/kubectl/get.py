"""``kubectl hotweights get``: the tree of rollouts, once or for as long as one looks."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console, Group
from rich.live import Live

from hotweights.kubectl import live, options
from hotweights.kubectl.options import Exit, Place
from hotweights.kubectl.views import picture, tree
from hotweights.kubectl.views.snapshot import Snapshot


def get(
    rollout: Annotated[
        str, typer.Argument(metavar="[ROLLOUT]", help="Name of the WeightRollout (default: all).")
    ] = "",
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on with every change, until Ctrl-C.")
    ] = False,
    output: Annotated[
        Literal["tree", "json"], typer.Option("--output", "-o", help="What to print.")
    ] = "tree",
    all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="Draw every node, however many are done.")
    ] = False,
    namespace: options.Namespace = "",
    all_namespaces: options.AllNamespaces = False,
    context: options.Context = "",
    kubeconfig: options.Kubeconfig = None,
    as_json: options.Json = False,
) -> None:
    """Draw rollouts as trees: steps, nodes and pods, what each does and why it waits.

    A pipe gets plain text; with -w and -o json each line is one state.

    Example: kubectl hotweights get tiny-llama -w
    """
    place = Place(namespace, context, kubeconfig, all_namespaces)
    as_json = as_json or output == "json"
    options.run(_get(place, rollout, watches=watch, as_json=as_json, folds=not all_nodes))


async def _get(place: Place, rollout: str, *, watches: bool, as_json: bool, folds: bool) -> int:
    async with place.connected() as (api, namespace):
        wanted = live.sources(namespace, rollout)
        if not watches:
            shot = (await live.read(api, wanted)).snapshot()
            _print(shot, namespace, rollout, as_json=as_json, folds=folds)
            return Exit.DONE
        async with live.followed(api, wanted) as store:
            try:
                if as_json or not sys.stdout.isatty():
                    await _print_changes(store, namespace, rollout, as_json=as_json, folds=folds)
                else:
                    await _draw_changes(store, namespace, rollout, folds=folds)
            except asyncio.CancelledError:
                return Exit.DONE  # Ctrl-C is how one ends looking
    return Exit.DONE


def _print(
    shot: Snapshot, namespace: str | None, rollout: str, *, as_json: bool, folds: bool
) -> None:
    """One state. Raises `Failed` where the rollout is not there."""
    _check_there(shot, namespace, rollout)
    found = picture.pictures(shot)
    if as_json:
        options.tell(as_dict(shot))
        return
    console = Console(highlight=False)
    width = console.width if console.is_terminal else None
    text = [*tree.lines(found, folds=folds, width=width), *tree.notes(shot)]
    if not found:
        print(f"there is no WeightRollout in {_where(namespace)}")
    elif console.is_terminal:
        console.print(Group(*text))
    else:
        print(tree.plain(text), end="")


def as_dict(shot: Snapshot) -> dict[str, object]:
    """What ``-o json`` prints: the rollouts, and what could not be read."""
    return {
        "rollouts": [found.to_dict() for found in picture.pictures(shot)],
        "unreadable": list(shot.unreadable()),
        "malformed": list(shot.malformed),
    }


async def _print_changes(
    store: live.Store, namespace: str | None, rollout: str, *, as_json: bool, folds: bool
) -> None:
    """Each state that differs from the one before, one below the other."""
    before = None
    while True:
        shot = store.snapshot()
        # ages alone are no change
        now = (shot.rollouts, shot.pods, shot.states)
        if now != before:
            if before is not None and not as_json:
                print()
            before = now
            _print(shot, namespace, rollout, as_json=as_json, folds=folds)
            sys.stdout.flush()
        await _next(store)


async def _draw_changes(
    store: live.Store, namespace: str | None, rollout: str, *, folds: bool
) -> None:
    """One picture that changes where it stands."""
    _check_there(store.snapshot(), namespace, rollout)
    with Live(auto_refresh=False, vertical_overflow="crop") as drawn:
        while True:
            shot = store.snapshot()
            found = picture.pictures(shot)
            text = [
                *tree.lines(found, folds=folds, width=drawn.console.width),
                *tree.notes(shot),
            ]
            drawn.update(Group(*text), refresh=True)
            await _next(store, seconds=1.0)


def _check_there(shot: Snapshot, namespace: str | None, rollout: str) -> None:
    """Raises `Failed` where the rollout is not there from the beginning."""
    if rollout and not shot.rollouts and not shot.malformed:
        raise options.not_found(f"there is no WeightRollout {rollout} in {_where(namespace)}")


def _where(namespace: str | None) -> str:
    return f"namespace {namespace}" if namespace else "any namespace"


async def _next(store: live.Store, seconds: float | None = None) -> None:
    """Wait for a change; at most so long, since ages grow by themselves."""
    await asyncio.sleep(live.MIN_SECONDS)
    try:
        async with asyncio.timeout(seconds):
            await store.changed.wait()
    except TimeoutError:
        return
    store.changed.clear()
