"""What the operator hears: nothing that is gone stays, nothing that cannot be read decides, and no
outage ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from hotweights_common.backoff import Backoff
from hotweights_kube import errors
from hotweights_kube.client import Listing, Selection
from hotweights_kube.resources import Body, Resource
from hotweights_kube.watch import WatchTiming
from hotweights_operator.model.objects import NodeState, Rollout
from hotweights_operator.runtime import handlers
from hotweights_operator.runtime.cache import Cache, Kind
from hotweights_operator.runtime.informers import OURS, Informers, WatchedKind
from hotweights_operator.runtime.malformed import NEVER
from hotweights_operator.runtime.observe import node_state
from hotweights_operator.settings import Settings, parse
from tests.operator.kopf_alone import kopf_running

QUICK = WatchTiming(backoff=Backoff(0.001, 0.002))


class Decider:
    """Remembers what it was told to look at."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.told: list[tuple[Kind, str]] = []
        self.all = 0

    def changed(self, kind: Kind, key: str, old: object) -> None:
        self.told.append((kind, key))

    def everything(self) -> None:
        self.all += 1


class Cluster:
    """Answers lists from what there is. A watch hears nothing and is cut now and then: whatever
    changes, changes unseen.
    """

    def __init__(self) -> None:
        self.objects: dict[str, list[Body]] = {}  # by plural
        self.version = 100
        self.refused = {""}  # plurals that cannot be listed
        self.lists = 0
        self.cut = asyncio.Event()

    async def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        self.lists += 1
        if resource.plural in self.refused:
            raise errors.Forbidden("not yet")
        namespace = selection.namespace if selection else None
        found = [
            body
            for body in self.objects.get(resource.plural, [])
            if namespace in (None, body["metadata"].get("namespace"))
            and self._labelled(body, selection)
        ]
        for body in found:
            yield Listing([body], str(self.version))
        if not found:
            yield Listing([], str(self.version))

    def _labelled(self, body: Body, selection: Selection | None) -> bool:
        wanted = (
            dict(pair.split("=") for pair in selection.label_selector.split(",") if pair)
            if selection
            else {}
        )
        return wanted.items() <= (body["metadata"].get("labels") or {}).items()

    async def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncGenerator[Body, None]:
        await self.cut.wait()
        yield {"type": "ERROR", "object": {"code": 410, "message": "too old"}}


def settings(*watched: str, **more: Any) -> Settings:
    read = parse([f"--watch-namespace={name}" for name in watched], {})
    return Settings(**{**{name: getattr(read, name) for name in Settings.__slots__}, **more})


def pod(name: str, namespace: str = "a", labels: dict[str, str] | None = None) -> Body:
    metadata = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "resourceVersion": "1"}
    return {"metadata": {**metadata, "labels": {"hotweights.dev/inject": "true", **(labels or {})}}}


def rollout(
    name: str = "r", namespace: str = "a", version: int = 1, uid: str = "u", **spec: Any
) -> Body:
    selector = {"selector": {"matchLabels": {"app": "llm"}}}
    metadata = {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": str(version)}
    return {
        "metadata": metadata,
        "spec": {"versionRef": {"name": "v1"}, "target": selector, **spec},
    }


def node_weights(
    name: str, version: int = 1, namespace: str = "hotweights-system", **more: Any
) -> Body:
    metadata = {
        "name": name,
        "namespace": namespace,
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
    }
    return {"metadata": metadata, "spec": {"nodeName": name}, **more}


def source(informers: Informers, kind: Kind) -> WatchedKind:
    return next(source for source in informers.sources if source.kind == kind)


async def until(query: Any) -> None:
    async with asyncio.timeout(20):
        while not query():  # noqa: ASYNC110 - what is waited for is what tasks do
            await asyncio.sleep(0.001)


class Running:
    """A informers with all its tasks."""

    def __init__(self, cluster: Cluster, told: Settings) -> None:
        self.cluster, self.decider, self.now = cluster, Decider(), 0.0
        self.cache = self.decider.cache
        self.informers = Informers(self.decider, told, timing=QUICK, clock=lambda: self.now)

    async def __aenter__(self) -> Running:
        self.start()
        await until(self.informers.complete.is_set)
        return self

    def start(self) -> None:
        follows = [
            self.informers.follow(self.cluster, source, namespace)
            for source in self.informers.sources
            if not source.by_kopf
            for namespace in source.namespaces
        ]
        self.tasks = [
            asyncio.create_task(part) for part in (*follows, self.informers.relist(self.cluster))
        ]

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        ends = await asyncio.gather(*self.tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends

    async def everything_is_listed_again(self) -> None:
        self.cluster.version += 100
        before = self.cluster.lists
        self.cluster.cut.set()
        await until(lambda: self.cluster.lists > before + 12)
        self.cluster.cut.clear()

    def keys(self, kind: Kind) -> set[str]:
        return {source(self.informers, kind).key_of(value) for value in self.cache.values(kind)}


AGENT = {"app.kubernetes.io/name": "hotweights", "app.kubernetes.io/component": "agent"}
GHOSTS: dict[Kind, tuple[str, Body, Body]] = {
    "rollout": ("weightrollouts", rollout("gone", uid="g"), rollout("stays")),
    "version": (
        "weightversions",
        {
            **rollout("gone"),
            "spec": {"model": "m", "version": "v", "source": {"uri": "file:///m/v"}},
        },
        {
            **rollout("stays"),
            "spec": {"model": "m", "version": "v", "source": {"uri": "file:///m/v"}},
        },
    ),
    "pod": ("pods", pod("gone"), pod("stays")),
    "node": (
        "nodes",
        {"metadata": pod("gone")["metadata"]},
        {"metadata": pod("stays")["metadata"]},
    ),
    "state": ("nodeweights", node_weights("gone"), node_weights("stays")),
    "agent": (
        "pods",
        pod("gone", "hotweights-system", AGENT),
        pod("stays", "hotweights-system", AGENT),
    ),
}


@pytest.mark.parametrize(
    "watched", [(), ("a", "b", "hotweights-system")], ids=["everywhere", "some namespaces"]
)
@pytest.mark.parametrize("kind", GHOSTS)
async def test_what_vanished_unseen_is_forgotten(kind: Kind, watched: tuple[str, ...]) -> None:
    plural, gone, stays = GHOSTS[kind]
    cluster = Cluster()
    cluster.objects[plural] = [gone, stays]
    async with Running(cluster, settings(*watched, relist_seconds=0.001)) as running:
        lost, kept = (source(running.informers, kind).key(body) for body in (gone, stays))
        assert running.keys(kind) == {lost, kept}
        cluster.objects[plural] = [stays]
        await running.everything_is_listed_again()
        await until(lambda: running.keys(kind) == {kept})
        assert (kind, lost) in running.decider.told, "what depends on it is looked at"


async def test_a_list_of_one_namespace_says_nothing_of_another() -> None:
    cluster = Cluster()
    cluster.objects["pods"] = [pod("p", "a"), pod("q", "b")]
    cluster.objects["weightrollouts"] = [rollout("r", "a"), rollout("r", "b", uid="v")]
    async with Running(cluster, settings("a", "b", relist_seconds=0.001)) as running:
        await running.everything_is_listed_again()
        assert running.keys("pod") == {"uid-p", "uid-q"}
        assert running.keys("rollout") == {"a/r", "b/r"}


async def test_an_etcd_that_was_restored_from_a_backup_is_believed() -> None:
    """Everything in it is older than what is known, and still what there is."""
    cluster = Cluster()
    cluster.objects["weightrollouts"] = [rollout("r", version=90, paused=True), rollout("later")]
    cluster.objects["nodeweights"] = [node_weights("n", 90), node_weights("later", 95)]
    async with Running(cluster, settings(relist_seconds=0.001)) as running:
        running.cache.put("state", "n", 99, node_state(node_weights("n", 99)))
        cluster.objects["weightrollouts"] = [rollout("r", version=20)]
        cluster.objects["nodeweights"] = [node_weights("n", 21, status={"bootID": "of-old"})]
        cluster.version = -50
        await running.everything_is_listed_again()
        await until(lambda: running.keys("state") == {"n"})
        await until(lambda: running.keys("rollout") == {"a/r"})
        assert running.cache.get("state", "n").status.boot_id == "of-old"
        assert not running.cache.get("rollout", "a/r").spec.paused
        assert ("state", "n") in running.decider.told


async def test_agents_are_known_by_their_addresses() -> None:
    """Where others are sent with a token must be one of them."""
    cluster, body = Cluster(), pod("agent", "hotweights-system", AGENT)
    body["status"] = {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}
    cluster.objects["pods"] = [body]
    async with Running(cluster, settings()) as running:
        await until(lambda: bool(running.keys("agent")))
        assert running.cache.get("agent", "uid-agent").addresses == ("10.0.0.1", "fd00::1")


async def test_what_we_wrote_last_and_somebody_deleted_unseen_is_forgotten() -> None:
    cluster = Cluster()
    cluster.objects["nodeweights"] = [node_weights("n", 90)]
    async with Running(cluster, settings()) as running:
        for name, version in (("n", 150), ("never-seen", 151)):  # answers to our own writes
            running.cache.put("state", name, version, node_state(node_weights(name, version)))
        cluster.objects["nodeweights"] = []
        await running.everything_is_listed_again()
        await until(lambda: not running.keys("state"))


async def test_what_we_wrote_after_the_list_stays() -> None:
    async with Running(Cluster(), settings()) as running:
        running.cache.put("state", "new", 10_000, node_state(node_weights("new", 10_000)))
        await running.everything_is_listed_again()
        assert running.keys("state") == {"new"}


ALL = {"weightrollouts", "weightversions", "pods", "nodes", "nodeweights"}


@pytest.mark.parametrize("last", sorted(ALL))
async def test_nothing_is_decided_before_everything_was_listed(last: str) -> None:
    cluster = Cluster()
    cluster.refused, cluster.objects["weightrollouts"] = ALL, [rollout()]
    running = Running(cluster, settings(relist_seconds=0.001))
    informers, decider, running.now = running.informers, running.decider, 100.0
    running.start()
    await until(lambda: cluster.lists > 12)
    assert informers.unlisted() == ["agent", "node", "pod", "rollout", "state", "version"]
    assert set(informers.ages().values()) == {100.0}, "a refusal is no word of anything"
    cluster.refused = {last}
    await until(lambda: len(informers.unlisted()) <= 2)
    await until(lambda: cluster.lists > 40)
    informers.note(source(informers, "rollout"), rollout(version=7))  # kopf may be faster
    assert (decider.told, decider.all, informers.complete.is_set()) == ([], 0, False)
    cluster.refused = set()
    await until(informers.complete.is_set)
    assert decider.all == 1
    assert set(informers.ages().values()) == {0.0}
    await running.__aexit__()


def feed_of(*watched: str) -> tuple[Informers, Decider]:
    decider = Decider()
    informers = Informers(decider, settings(*watched))
    informers.complete.set()
    return informers, decider


def test_our_own_write_that_comes_back_is_not_parsed_again() -> None:
    informers, decider = feed_of()
    decider.cache.put("state", "n", 7, node_state(node_weights("n", 7)))
    informers.note(
        source(informers, "state"), {**node_weights("n", 7), "spec": "nobody looks at it"}
    )
    assert decider.told == []
    assert informers.malformed() == dict.fromkeys(OURS, 0)


NEWER_RELEASE: dict[str, Any] = {"strategy": {"type": "Canary"}}


def test_a_rollout_that_cannot_be_read_stays_paused_and_cannot_be_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    informers, decider = feed_of()
    rollouts = source(informers, "rollout")
    informers.note(rollouts, rollout(version=5))
    for _ in range(3):
        informers.note(rollouts, rollout(version=6, **NEWER_RELEASE))
    held = decider.cache.get("rollout", "a/r")
    assert (held.spec.paused, held.spec.version_ref.name, held.resource_version) == (
        True,
        "v1",
        "5",
    )
    assert informers.malformed()["rollout"] == 1
    assert decider.told == [("rollout", "a/r")] * 2
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1, (
        "once per state"
    )

    informers.note(rollouts, rollout(version=7))
    assert not decider.cache.get("rollout", "a/r").spec.paused
    assert informers.malformed()["rollout"] == 0


def test_a_rollout_that_this_operator_never_could_read_keeps_its_pods() -> None:
    informers, decider = feed_of()
    informers.note(source(informers, "rollout"), rollout(version=6, **NEWER_RELEASE))
    held: Rollout = decider.cache.get("rollout", "a/r")
    assert (held.spec.paused, held.resource_version) == (True, NEVER)
    assert held.spec.target.selector.match_labels == {"app": "llm"}


def test_what_cannot_be_read_at_all_counts_as_absent_and_is_counted() -> None:
    informers, decider = feed_of()
    informers.note(source(informers, "rollout"), rollout(target=3))
    informers.note(source(informers, "state"), {**node_weights("n", 7), "spec": {"rollouts": 3}})
    assert decider.cache.values("rollout") == decider.cache.values("state") == []
    assert informers.malformed() == {"rollout": 1, "version": 0, "state": 1}


def test_a_new_rollout_of_that_name_is_not_taken_for_the_one_before() -> None:
    informers, decider = feed_of()
    informers.note(
        source(informers, "rollout"), rollout(version=5, uid="first", versionRef={"name": "old"})
    )
    informers.note(source(informers, "rollout"), rollout(version=9, uid="second", **NEWER_RELEASE))
    held = decider.cache.get("rollout", "a/r")
    assert (held.uid, held.spec.version_ref.name) == ("second", "v1")


def test_node_weights_that_cannot_be_read_stay_what_they_were() -> None:
    informers, decider = feed_of()
    informers.note(source(informers, "state"), node_weights("n", 7))
    informers.note(source(informers, "state"), node_weights("n", 8, status={"engines": 3}))
    held: NodeState = decider.cache.get("state", "n")
    assert held.resource_version == "7", "a write that is decided on it is refused"
    assert informers.malformed()["state"] == 1


@pytest.mark.parametrize("how", ["deleted", "not listed"])
def test_what_is_gone_is_no_longer_counted(how: str) -> None:
    informers, decider = feed_of("a", "b")
    rollouts = source(informers, "rollout")
    for namespace in ("a", "b"):
        informers.note(
            rollouts, rollout(namespace=namespace, uid=namespace, version=6, **NEWER_RELEASE)
        )
    if how == "deleted":
        informers.note(rollouts, rollout(uid="a", version=8, **NEWER_RELEASE), deleted=True)
    else:
        informers.listed(rollouts, "a", [], 8)
    assert informers.malformed()["rollout"] == 1
    assert [value.namespace for value in decider.cache.values("rollout")] == ["b"]


def test_each_kind_has_its_own_silence() -> None:
    now = 0.0
    informers = Informers(Decider(), settings("a", "b"), clock=lambda: now)
    now = 100.0
    for kind in ("rollout", "version", "node", "state", "agent"):
        for namespace in source(informers, kind).namespaces:
            informers.hear(source(informers, kind), namespace)
    informers.hear(source(informers, "pod"), "a")
    now = 130.0
    expected = {
        "rollout": 30.0,
        "version": 30.0,
        "pod": 130.0,
        "node": 30.0,
        "state": 30.0,
        "agent": 30.0,
    }
    assert informers.ages() == expected, "of the pods in b nothing was heard"


DISCOVERY = {
    "/api": {"versions": ["v1"]},
    "/api/v1": {
        "resources": [
            {
                "name": "namespaces",
                "singularName": "namespace",
                "kind": "Namespace",
                "namespaced": False,
                "verbs": [],
            }
        ]
    },
    "/apis": {
        "groups": [
            {
                "name": "hotweights.dev",
                "versions": [{"version": "v1alpha1"}],
                "preferredVersion": {"version": "v1alpha1"},
            }
        ]
    },
    "/apis/hotweights.dev/v1alpha1": {
        "resources": [
            {
                "name": "weightrollouts",
                "singularName": "weightrollout",
                "kind": "WeightRollout",
                "namespaced": True,
                "verbs": ["list", "watch"],
            }
        ]
    },
}


class Outage:
    """An API server that says what it has, and answers everything else with errors at first."""

    def __init__(self, failures: int, status: int) -> None:
        self.left, self.status = failures, status

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path in DISCOVERY:
            return web.json_response(DISCOVERY[request.path])
        self.left -= 1
        if self.left >= 0:
            return web.json_response({"kind": "Status", "message": "no"}, status=self.status)
        return web.json_response({"items": []})


@pytest_asyncio.fixture
async def outage(request: pytest.FixtureRequest) -> AsyncGenerator[tuple[Outage, str], None]:
    made = Outage(*request.param)
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield made, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("outage", [(60, 503), (60, 403), (60, 429)], indirect=True)
async def test_kopf_asks_for_ever(outage: tuple[Outage, str]) -> None:
    from kopf._cogs.clients import api, auth  # how it goes through the waits is nowhere public
    from kopf._cogs.structs.credentials import ConnectionInfo

    made, url = outage
    told = handlers.settings_for_kopf()
    told.networking.error_backoffs = handlers.Endless(0.0, 0.001)
    context = auth.APIContext(ConnectionInfo(server=url))
    answer = await api.request(
        "get", "/", settings=told, context=context, logger=logging.getLogger("quiet")
    )
    assert await answer.json() == {"items": []}
    assert made.left == -1
    await context.session.close()


def test_the_waits_of_kopf_begin_anew_with_each_request_and_have_no_end() -> None:
    waits = handlers.settings_for_kopf().networking.error_backoffs
    for _ in range(2):
        found = [wait for wait, _ in zip(waits, range(1000), strict=False)]
        assert found[:6] == [0.5, 1, 2, 3, 5, 10]
        assert set(found[6:]) == {10}
    assert not hasattr(waits, "__len__"), "kopf counts up to it"


@pytest.mark.timeout(120)  # kopf has seconds to end
@pytest.mark.parametrize("outage", [(10**6, 404)], indirect=True)
async def test_kopf_that_ends_is_begun_anew_and_takes_nobody_with_it(
    outage: tuple[Outage, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tmp_path / "config"
    cluster = {"name": "c", "cluster": {"server": outage[1]}}
    context = {"name": "here", "context": {"cluster": "c", "user": "u"}}
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: here\nclusters: "
        f"[{cluster}]\ncontexts: [{context}]\n"
        "users: [{name: u, user: {token: secret}}]\n"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    monkeypatch.setattr(handlers, "AGAIN_SECONDS", (0.01, 0.01))
    begun: list[None] = []
    ours = asyncio.create_task(asyncio.Event().wait())
    async with kopf_running(feed_of()[0], lambda: begun.append(None)) as kopf, asyncio.timeout(90):
        while len(begun) < 3:  # noqa: ASYNC110 - what is waited for is what tasks do
            await asyncio.sleep(0.01)
        assert not kopf.done()
        assert not ours.done(), "a task of ours goes on"
    ours.cancel()
    assert "kopf ended and is begun anew" in caplog.text


class Store:
    """NodeWeights with a history, as an API server has them."""

    def __init__(self) -> None:
        self.version, self.born = 0, 0
        self.objects: dict[str, Body] = {}
        self.history: list[tuple[int, Body]] = []
        self.compacted = 0
        self.moved = asyncio.Condition()
        self.cuts = 0

    def write(self, name: str) -> Body:
        """Create or change it."""
        self.version += 1
        known = self.objects.get(name)
        self.born += known is None
        uid = known["metadata"]["uid"] if known else f"uid-{self.born}"
        body = node_weights(name, self.version)
        body["metadata"]["uid"] = uid
        self.objects[name] = body
        self.history.append(
            (self.version, {"type": "MODIFIED" if known else "ADDED", "object": body})
        )
        return body

    def delete(self, name: str) -> None:
        """If it is there."""
        body = self.objects.pop(name, None)
        if body is not None:
            self.version += 1
            last = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
            self.history.append((self.version, {"type": "DELETED", "object": last}))

    async def pages(
        self, resource: Resource, selection: Selection | None = None
    ) -> AsyncGenerator[Listing, None]:
        found, version = list(self.objects.values()), str(self.version)
        for body in found:
            yield Listing([body], version)
            await asyncio.sleep(0)  # writes come in between pages, and the list does not show them
        if not found:
            yield Listing([], version)

    async def stream(
        self, resource: Resource, selection: Selection, query: Any, *, silence_seconds: float
    ) -> AsyncGenerator[Body, None]:
        seen, cuts = int(query["resourceVersion"]), self.cuts
        while self.cuts == cuts:
            if seen < self.compacted:
                yield {"type": "ERROR", "object": {"code": 410, "message": "too old"}}
            due = [(version, event) for version, event in self.history if version > seen]
            if not due:
                async with self.moved:
                    await self.moved.wait()
                continue
            seen, event = due[0]
            yield event

    async def tell(self) -> None:
        """Let whoever watches go on."""
        async with self.moved:
            self.moved.notify_all()
        for _ in range(20):
            await asyncio.sleep(0)


STEPS = st.one_of(
    *(
        st.tuples(st.just(step), st.sampled_from("abc"))
        for step in ("write", "own write", "delete")
    ),
    *(st.tuples(st.just(step), st.just("")) for step in ("cut", "forget", "tell")),
)


@pytest.mark.timeout(180)  # a hundred lives
@given(st.lists(STEPS, max_size=25))
def test_whatever_happens_unseen_the_cache_ends_with_what_there_is(
    steps: list[tuple[str, str]],
) -> None:
    asyncio.run(_live_through(steps))


async def _live_through(steps: list[tuple[str, str]]) -> None:
    store, decider = Store(), Decider()
    informers = Informers(decider, settings(), timing=WatchTiming(backoff=Backoff(0.0, 0.0)))
    states = source(informers, "state")
    task = asyncio.create_task(informers.follow(store, states, informers.settings.namespace))
    for step, name in steps:
        match step:
            case "write":
                store.write(name)
            case "own write":
                body = store.write(name)
                decider.cache.put("state", name, store.version, node_state(body))
            case "delete":
                store.delete(name)
            case "cut":
                store.cuts += 1
            case "forget":  # the past, and whoever still wants to hear of it lists
                store.compacted, store.history, store.cuts = store.version + 1, [], store.cuts + 1
                store.version += 1
            case "tell":
                await store.tell()
    wanted = {
        name: int(body["metadata"]["resourceVersion"]) for name, body in store.objects.items()
    }
    async with asyncio.timeout(20):
        while {
            state.name: int(state.resource_version) for state in decider.cache.values("state")
        } != wanted:
            await store.tell()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
