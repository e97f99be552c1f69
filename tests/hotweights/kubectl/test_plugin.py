"""The plugin against a real API server: objects are made here, and what the operator would say is
written by the tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hotweights.kubectl import scenes
from tests.hotweights.kubectl.conftest import NAMESPACE, Kubectl, Run

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(300)]
Body = dict[str, Any]
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 120.0
READY = scenes.condition("Ready", "True", "Complete")


@pytest.fixture(autouse=True)
def _here(kubectl: Kubectl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubectl.kubeconfig))


@pytest.fixture
def rollout(kubectl: Kubectl) -> Iterator[str]:
    """A canary that waits for a promotion, with all that belongs to it."""
    bodies = scenes.fleet(scenes.rollout(scenes.CANARY, scenes.WAITS))
    uids: dict[str, str] = {}
    for kind in ("node", "agent", "pod", "version", "rollout"):
        for body in bodies[kind] or []:
            kubectl.put(with_container(body) if body["kind"] == "Pod" else body)
            name, namespace = body["metadata"]["name"], body["metadata"].get("namespace", NAMESPACE)
            made = kubectl.get(body["kind"], name, namespace)["metadata"]["uid"]
            uids[body["metadata"]["uid"]] = made
    tell(kubectl, observedGeneration=1)
    for body in bodies["state"] or []:
        text = json.dumps(body)
        for fake, real in uids.items():
            text = text.replace(f'"{fake}"', f'"{real}"')
        kubectl.put(json.loads(text))
    yield "tiny"
    kubectl("delete", "wroll,wver,pods", "--all", "-n", NAMESPACE, "--grace-period=0", "--force")
    kubectl(
        "delete",
        "nodeweights,pods",
        "--all",
        "-n",
        "hotweights-system",
        "--grace-period=0",
        "--force",
    )
    kubectl("delete", "nodes", "--all")


def with_container(body: Body) -> Body:
    """A pod that an API server takes."""
    spec = {
        "automountServiceAccountToken": False,
        "containers": [{"name": "vllm", "image": "none"}],
        **body["spec"],
    }
    spec["containers"] = [{"image": "none", **container} for container in spec["containers"]]
    spec["tolerations"] = [{"operator": "Exists"}]
    status = dict(body["status"])
    status["containerStatuses"] = [
        {"ready": True, "image": "none", "imageID": "", **one}
        for one in status.get("containerStatuses", ())
    ]
    return {**body, "apiVersion": "v1", "spec": spec, "status": status}


def tell(kubectl: Kubectl, **status: Any) -> None:
    """The operator says so."""
    kubectl.tell("weightrollout", "tiny", status)


@contextmanager
def meanwhile(does: Callable[[], None]) -> Iterator[None]:
    """Something happens beside what the test waits for; its failure fails the test."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            does()
        except BaseException as error:  # noqa: BLE001  # carried over to the test
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]


def command(kubectl: Kubectl) -> str:
    """What the annotation says; empty: nothing."""
    metadata = kubectl.get("weightrollout", "tiny")["metadata"]
    return str((metadata.get("annotations") or {}).get("hotweights.dev/command", ""))


def awaited(kubectl: Kubectl) -> str:
    """The command, once it is there."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (found := command(kubectl)):
        assert time.monotonic() < end, "no command was given"
        time.sleep(0.1)
    return found


def answers(kubectl: Kubectl, outcome: str, message: str) -> Callable[[], None]:
    """An operator that answers the next command so."""

    def answer() -> None:
        text = awaited(kubectl)
        verb, revision, _ = text.split()
        said = {"text": text, "verb": verb, "revision": int(revision)}
        tell(kubectl, lastCommand={**said, "outcome": outcome, "message": message})

    return answer


# -- get ----------------------------------------------------------------------------------------


def test_get_draws_what_the_cluster_has(run: Run, rollout: str) -> None:
    done = run("get", rollout, "-n", NAMESPACE)
    assert done.returncode == 0, done.stderr
    assert "models/tiny  v1 → v2  Paused  revision 2" in done.stdout
    assert "● pause until promoted  waits for a promotion" in done.stdout
    # what this API server calls now is long after the statuses of the scene
    assert "node-1  ████████████████████  5.0MiB staged" in done.stdout
    assert "tiny-c" in done.stdout


def test_get_is_for_programs_too_and_for_all_namespaces(run: Run, rollout: str) -> None:
    done = run("get", "-A", "-o", "json")
    (found,) = json.loads(done.stdout)["rollouts"]
    assert (found["name"], len(found["nodes"]), len(found["steps"])) == (rollout, 2, 3)
    assert json.loads(run("get", "--json", "-n", "default").stdout)["rollouts"] == []


def test_kubectl_finds_the_plugin_and_watches_by_it(kubectl: Kubectl, rollout: str) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    words = [kubectl.program, "hotweights", "get", rollout, "-n", NAMESPACE, "-w", "-o", "json"]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        tell(kubectl, message="something else")
        for line in process.stdout:
            (found,) = json.loads(line)["rollouts"]
            if found["message"] == "something else":
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert first["rollouts"][0]["phase"] == "Paused"
    assert (process.returncode, "Traceback" in rest + errors) == (0, False)


# -- status: one test for each exit code --------------------------------------------------------


def test_status_waits_for_the_end_with_a_line_for_each_change(
    run: Run, kubectl: Kubectl, rollout: str
) -> None:
    def ends() -> None:
        tell(kubectl, phase="Activating", message="2 of 3 pods serve v2")
        tell(kubectl, phase="Complete", message="all 3 pods serve v2", conditions=[READY])

    with meanwhile(ends):
        done = run("status", rollout, "-n", NAMESPACE, "--timeout", PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Complete: all 3 pods serve v2"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ({"conditions": [scenes.condition("Stalled", "True", "ShapeMismatch")]}, "Degraded"),
        ({"abortedRevision": 2}, "Aborted"),
        ({"rolledBack": {"from": "tiny-v2", "by": "Command", "to": scenes.named("v1")}}, "RolledBack"),
    ],
)  # fmt: skip
def test_status_ends_with_1_where_waiting_does_not_help(
    run: Run, kubectl: Kubectl, rollout: str, status: Body, outcome: str
) -> None:
    tell(kubectl, **status)
    done = run("status", rollout, "-n", NAMESPACE, "--json")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (1, outcome)


def test_status_ends_with_1_where_the_rollout_is_deleted(
    run: Run, kubectl: Kubectl, rollout: str
) -> None:
    with meanwhile(lambda: deleted_once_seen(kubectl)):
        done = run("status", rollout, "-n", NAMESPACE, "--timeout", PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "was deleted while it was waited for" in done.stderr


def deleted_once_seen(kubectl: Kubectl) -> None:
    """Not before the plugin has begun to look: then there would be none."""
    time.sleep(3.0)
    kubectl("delete", "wroll", "tiny", "-n", NAMESPACE)


def test_status_ends_with_3_where_the_time_is_over(run: Run, rollout: str) -> None:
    done = run("status", rollout, "-n", NAMESPACE, "--timeout", "2")
    assert done.returncode == 3
    assert "not complete within 2 s: Paused: step 2 of 3: waits for a promotion" in done.stderr


def test_what_is_not_there_or_not_meant_ends_with_2(run: Run, rollout: str) -> None:
    done = run("status", "other", "-n", NAMESPACE)
    assert (done.returncode, done.stderr) == (
        2, "error: there is no WeightRollout other in namespace models\n"
    )  # fmt: skip
    for words in (["get", "other"], ["promote", "other"], ["history", "other"]):
        assert run(*words, "-n", NAMESPACE).returncode == 2
    assert run("plan", rollout, "-n", NAMESPACE, "--to", "v9").returncode == 2
    assert run("status", rollout, "--timeuot", "3").returncode == 2
    assert run("rollback", rollout, "-n", NAMESPACE, "--to", "a b").returncode == 2
    assert json.loads(run("status", "--json").stdout)["error"]["reason"] == "WrongUsage"


def test_a_cluster_that_cannot_be_asked_ends_with_4(run: Run, tmp_path: Path) -> None:
    done = run("get", "--kubeconfig", tmp_path / "none")
    assert done.returncode == 4
    assert "tried again" not in done.stderr


def test_ctrl_c_ends_a_wait_and_says_so(rollout: str) -> None:
    words = [BIN / "kubectl-hotweights", "status", rollout, "-n", NAMESPACE]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Paused")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, errors) == (130, "error: interrupted; tiny goes on without you\n")


# -- commands -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        (["promote"], "promote"),
        (["promote", "--full"], "promote-full"),
        (["rollback", "--to", "v1"], "rollback@v1"),
        (["restart-failed"], "restart-failed"),
    ],
)
def test_a_command_is_done_and_its_answer_printed(
    run: Run, kubectl: Kubectl, rollout: str, words: list[str], verb: str
) -> None:
    with meanwhile(answers(kubectl, "Done", "it is done")):
        done = run(words[0], rollout, *words[1:], "-n", NAMESPACE, "--timeout", PATIENCE_SECONDS)
    assert (done.returncode, done.stdout) == (0, "models/tiny: it is done\n"), done.stderr
    assert command(kubectl).startswith(f"{verb} 2 ")


def test_a_command_that_is_refused_ends_with_1(run: Run, kubectl: Kubectl, rollout: str) -> None:
    with meanwhile(answers(kubectl, "Refused", "there is nothing to abort")):
        done = run("abort", rollout, "-n", NAMESPACE, "--timeout", PATIENCE_SECONDS, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == {
        "reason": "Refused", "message": "models/tiny: there is nothing to abort"
    }  # fmt: skip


def test_a_command_that_nobody_answers_is_withdrawn(
    run: Run, kubectl: Kubectl, rollout: str
) -> None:
    done = run("pause", rollout, "-n", NAMESPACE, "--timeout", "1")
    assert done.returncode == 3
    assert "so it was withdrawn and nothing was done" in done.stderr
    assert command(kubectl) == ""


def test_ctrl_c_withdraws_a_command(kubectl: Kubectl, rollout: str) -> None:
    words = [BIN / "kubectl-hotweights", "resume", rollout, "-n", NAMESPACE, "--timeout", "300"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        text = awaited(kubectl)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    said = f"error: interrupted; the command {text!r} was withdrawn, nothing was done\n"
    assert (process.returncode, errors, command(kubectl)) == (130, said, "")


def test_another_command_that_comes_before_the_answer_is_told(
    run: Run, kubectl: Kubectl, rollout: str
) -> None:
    def intervenes() -> None:
        awaited(kubectl)
        kubectl("annotate", "wroll", "tiny", "-n", NAMESPACE, "--overwrite",
                "hotweights.dev/command=abort 2 other")  # fmt: skip

    with meanwhile(intervenes):
        done = run("promote", rollout, "-n", NAMESPACE, "--timeout", PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "another command, 'abort 2 other', came before" in done.stderr


def test_without_waiting_a_command_is_given_each_time_anew(
    run: Run, kubectl: Kubectl, rollout: str
) -> None:
    texts = []
    for _ in range(2):
        done = run("retry", rollout, "-n", NAMESPACE, "--no-wait", "--revision", "7", "--json")
        assert done.returncode == 0
        texts.append(json.loads(done.stdout)["command"])
        assert command(kubectl) == texts[-1]
    assert texts[0] != texts[1]
    assert all(text.startswith("retry 7 ") for text in texts)


# -- the rest -----------------------------------------------------------------------------------


def test_a_plan_is_made_of_what_the_cluster_shows(run: Run, rollout: str) -> None:
    done = run("plan", rollout, "-n", NAMESPACE, "--to", "v1")
    assert done.returncode == 0, done.stderr
    assert "models/tiny: v2 → v1, Rolling" in done.stdout
    found = json.loads(run("plan", rollout, "-n", NAMESPACE, "--to", "tiny-v1", "--json").stdout)
    assert (found["from"], found["to"], found["resolved"]) == ("v2", "v1", True)


def test_history_and_doctor_read_a_cluster(run: Run, rollout: str) -> None:
    assert run("history", rollout, "-n", NAMESPACE).stdout.splitlines()[1].startswith("2 ")
    done = run("doctor", "-n", NAMESPACE)
    assert done.returncode == 1
    assert "Error: the operator: there is no Deployment of it\n  → install the chart" in done.stdout
    found = json.loads(run("doctor", "-A", "--json").stdout)["findings"]
    assert not [one for one in found if one["subject"].startswith("CustomResourceDefinition")]


def test_somebody_with_few_rights_is_told_which_he_lacks(
    run: Run, kubectl: Kubectl, rollout: str, tmp_path: Path
) -> None:
    kubectl("create", "serviceaccount", "viewer", "-n", NAMESPACE)
    kubectl("create", "role", "viewer", "-n", NAMESPACE, "--verb=get,list,watch",
            "--resource=weightrollouts.hotweights.dev,pods")  # fmt: skip
    kubectl("create", "rolebinding", "viewer", "-n", NAMESPACE, "--role=viewer",
            f"--serviceaccount={NAMESPACE}:viewer")  # fmt: skip
    token = kubectl("create", "token", "viewer", "-n", NAMESPACE).strip()
    theirs = kubeconfig(kubectl, tmp_path, {"token": token})
    end = time.monotonic() + PATIENCE_SECONDS  # rights count a moment after they were given
    while (done := run("get", "--kubeconfig", theirs)).returncode:
        assert time.monotonic() < end, done.stderr
    assert "not shown, for you may not list them: WeightVersions, NodeWeights, nodes" in done.stdout
    assert "Updated" not in done.stdout
    denied = run("promote", rollout, "--kubeconfig", theirs)
    assert denied.returncode == 4
    assert "Grant it in RBAC" in denied.stderr
    told = run("doctor", "--kubeconfig", theirs)
    assert "your rights: you may not patch weightrollouts.hotweights.dev" in told.stdout


def kubeconfig(kubectl: Kubectl, folder: Path, user: Body) -> Path:
    """For somebody else, with a namespace of their own; a context without one beside it."""
    body = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    cluster = body["contexts"][0]["context"]["cluster"]
    context = {"cluster": cluster, "user": "them"}
    body |= {
        "users": [{"name": "them", "user": user}],
        "contexts": [
            {"name": "theirs", "context": {**context, "namespace": NAMESPACE}},
            {"name": "bare", "context": context},
        ],
        "current-context": "theirs",
    }
    path = folder / "kubeconfig"
    path.write_text(json.dumps(body))
    return path


def test_a_login_by_a_program_and_a_named_context_work(
    run: Run, kubectl: Kubectl, rollout: str, tmp_path: Path
) -> None:
    body = json.loads(kubectl("config", "view", "--raw", "-o", "json"))
    token = body["users"][0]["user"]["token"]
    answer = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": token},
    }
    login = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "echo",
        "args": [json.dumps(answer)],
        "interactiveMode": "Never",
    }
    theirs = kubeconfig(kubectl, tmp_path, {"exec": login})
    assert "models/tiny" in run("get", "--kubeconfig", theirs).stdout
    bare = run("get", "--kubeconfig", theirs, "--context", "bare")
    assert bare.stdout == "there is no WeightRollout in namespace default\n"
    unknown = run("get", "--kubeconfig", theirs, "--context", "nobody")
    assert unknown.returncode == 4
    assert "nobody" in unknown.stderr


# -- completion ---------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What kubectl would be told."""
    done = subprocess.run(
        [BIN / "kubectl_complete-hotweights", *words],
        capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    *found, directive = done.stdout.splitlines()
    assert directive == ":4"
    return found


def test_commands_flags_and_names_of_the_cluster_are_completed(rollout: str) -> None:
    assert completed("pro") == ["promote"]
    assert completed("promote", "--f") == ["--full"]
    assert completed("promote", "-n", NAMESPACE, "") == [rollout]
    assert completed("rollback", rollout, "-n", NAMESPACE, "--to", "tiny-") == [
        "tiny-v1",
        "tiny-v2",
    ]
    assert completed("completion", "b") == ["bash"]
    assert completed("get", "-n", "mod") == [NAMESPACE]


def test_bash_takes_the_script(run: Run, rollout: str) -> None:
    script = run("completion", "bash").stdout
    asks = (
        f"{script}\nCOMP_WORDS=(kubectl-hotweights promote -n {NAMESPACE} ''); COMP_CWORD=4\n"
        '_kubectl_hotweights; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", asks],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"{rollout}\n"
    for shell in ("zsh", "fish"):
        assert "kubectl_complete-hotweights" in run("completion", shell).stdout
