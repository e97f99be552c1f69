"""What the documents tell their readers to type exists: verbs, flags, resources, values, files.
Whether it works, e2e/cluster finds out.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from e2e.harness import docs
from e2e.harness.docs import ROOT
from hotweights.adapters.inprocess.metrics import BinderMetrics
from hotweights.cli import app
from hotweights.replicate import metrics as replication
from hotweights_agent import metrics as agent
from hotweights_common.reasons import Reason
from hotweights_coordinator.server import metrics as coordinator
from hotweights_operator import metrics as operator
from hotweights_operator.runtime.cache import Cache
from localcluster import binaries

DOCUMENTS = sorted(
    {
        *docs.RUN,
        "CONTRIBUTING.md",
        *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")),
    }
)
VALUES = yaml.safe_load((ROOT / "helm" / "hotweights" / "values.yaml").read_text())
DEFINITIONS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "crds").glob("*.yaml"))]
OF_KUBERNETES = {
    "pod",
    "node",
    "deployment",
    "replicaset",
    "event",
    "namespace",
    "daemonset",
    "persistentvolumeclaim",
}
WITH_RESOURCE = {
    "get",
    "describe",
    "delete",
    "patch",
    "wait",
    "scale",
    "rollout status",
    "rollout restart",
    "label",
}


def commands(program: str) -> list[Any]:
    """Every command of the documents that this program is to run."""
    found = [
        (document, words)
        for document in DOCUMENTS
        for words in docs.ours(document)
        if words[0] == program
    ]
    return [
        pytest.param(words[1:], id=f"{document}: {' '.join(words)}"[:120])
        for document, words in found
    ]


def spans(pattern: str) -> list[Any]:
    """Whatever stands between backticks in the documents and looks like this."""
    found = {
        (document, span)
        for document in DOCUMENTS
        for span in docs.inline(document)
        if re.fullmatch(pattern, span)
    }
    return [pytest.param(span, id=f"{document}: {span}") for document, span in sorted(found)]


@functools.cache
def options(program: str, *verb: str) -> dict[str, bool]:
    """The flags that a real program's help lists, and whether each takes a value."""
    path = binaries.ensure([program])[program]
    pages = [[*verb, "--help"], *([["options"]] if program == "kubectl" else [])]
    text = "".join(
        subprocess.run([path, *page], capture_output=True, text=True, check=True, timeout=50).stdout
        for page in pages
    )
    found: dict[str, bool] = {}
    if program == "kubectl":  # -A, --all-namespaces=false:
        for short, long, default in re.findall(
            r"^ +(?:(-\w), )?(--[\w-]+)=(.*):$", text, re.MULTILINE
        ):
            found |= {flag: default not in ("true", "false") for flag in (short, long) if flag}
    else:  # -n, --namespace string   namespace scope
        for short, long, kind in re.findall(
            r"^ +(?:(-\w), )?(--[\w-]+)( \S+)?(?:  |$)", text, re.MULTILINE
        ):
            found |= {flag: bool(kind) and "[=" not in kind for flag in (short, long) if flag}
    return found


def arguments(words: list[str], flags: dict[str, bool]) -> list[str]:
    """What is left without the flags; a flag that is not known fails."""
    left, rest = [], iter(words)
    for word in rest:
        if not word.startswith("-"):
            left.append(word)
            continue
        flag, _, value = word.partition("=")
        assert flag in flags, f"there is no {flag}"
        if flags[flag] and not value:
            next(rest)
    return left


@pytest.mark.parametrize("words", commands("make"))
def test_make_knows_its_targets(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("words", commands("hotweights"))
def test_hotweights_knows_its_commands_and_flags(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands
        command = command.commands[name]
    known = {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known


@pytest.mark.parametrize("words", commands("kubectl"))
def test_kubectl_knows_its_verbs_flags_and_resources(words: list[str]) -> None:
    verb = words[:2] if words[0] in ("rollout", "config") else words[:1]
    left = arguments(words[len(verb) :], options("kubectl", *verb))
    if " ".join(verb) in WITH_RESOURCE and left and not left[0].startswith("$"):
        assert set(left[0].partition("/")[0].split(",")) <= resources()


def resources() -> set[str]:
    """What kubectl may be asked for: our definitions' names in all their forms, and some of
    Kubernetes'.
    """
    names = [definition["spec"]["names"] for definition in DEFINITIONS]
    ours = {
        form
        for name in names
        for form in (name["plural"], name["singular"], *name.get("shortNames", ()))
    }
    return ours | OF_KUBERNETES | {f"{name}s" for name in OF_KUBERNETES}


@pytest.mark.parametrize("words", commands("helm"))
def test_helm_takes_it_with_these_values(words: list[str], tmp_path: Path) -> None:
    """An installation is rendered as the document says, with the document's own values.yaml; the
    chart's schema knows every key.
    """
    flags = options("helm", *words[: 2 if words[0] == "show" else 1])
    left = arguments(words[1:], flags)
    if words[0] not in ("install", "upgrade") or len(left) < 2:
        return
    for document in docs.RUN:
        for block in docs.blocks(document):
            if block.text.startswith("# values.yaml\n"):
                (tmp_path / "values.yaml").write_text(block.text)
    rendered = [
        str(tmp_path / word) if word == "values.yaml" else word
        for word in words[1:]
        if word != "--install"
    ]
    done = subprocess.run(
        [binaries.ensure(["helm"])["helm"], "template", *rendered],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def named_paths() -> Iterator[Any]:
    """Files and folders of this tree that a document names."""
    top = {path.name for path in ROOT.iterdir()} - {"build"}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        words = {word for command in docs.ours(document) for word in command} | set(
            docs.inline(document)
        )
        names = {
            word
            for word in words
            if re.fullmatch(r"[\w.-]+/[\w./-]*\w/?", word)
            and word.split("/")[0] in top
            and not re.search(r"/v\d+$", word)  # the name of a format
        }
        names |= {
            str(Path(document).parent / link) for link in re.findall(r"\]\(([\w./-]+)\)", text)
        }
        yield from (pytest.param(name, id=f"{document}: {name}") for name in sorted(names))


@pytest.mark.parametrize("name", list(named_paths()))
def test_what_is_named_is_there(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize(
    "key",
    [
        s
        for s in spans(r"[a-z]\w*(\.\w+)+")
        if s.values[0].split(".")[0] in VALUES and not s.values[0].endswith(".py")
    ],
)
def test_the_chart_has_this_value(key: str) -> None:
    found = VALUES
    for part in key.split("."):
        assert part in found, f"values.yaml has no {key}"
        found = found[part]


@pytest.mark.parametrize("field", spans(r"(spec|status)(\.\w+)+"))
def test_a_definition_has_this_field(field: str) -> None:
    def has(schema: dict[str, Any], names: list[str]) -> bool:
        schema = schema.get("items", schema)
        return not names or (
            names[0] in schema.get("properties", {})
            and has(schema["properties"][names[0]], names[1:])
        )

    schemas = [
        definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for definition in DEFINITIONS
    ]
    assert any(has(schema, field.split(".")) for schema in schemas)


@functools.cache
def source() -> str:
    """Everything that could say or read a word."""
    text = [
        path
        for folder in (
            "agent",
            "coordinator",
            "crds",
            "operator",
            "planner",
            "storage",
            "transports",
            "hotweights",
            "hack",
            "e2e",
        )
        for path in (ROOT / folder).rglob("*.py")
    ]
    return "".join(
        path.read_text() for path in [*text, ROOT / "Makefile", *(ROOT / "helm").rglob("*.yaml")]
    )


@pytest.mark.parametrize("variable", spans(r"HOTWEIGHTS_[A-Z_]+"))
def test_this_variable_is_read_somewhere(variable: str) -> None:
    assert variable in source()


def reasons() -> list[str]:
    """The reasons in the first column of the tables of docs/troubleshooting.md."""
    cells = re.findall(
        r"^\| (`[A-Z].*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE
    )
    return sorted({reason for cell in cells for reason in re.findall(r"`(\w+)`", cell)})


@pytest.mark.parametrize("reason", reasons())
def test_this_reason_is_given_somewhere(reason: str) -> None:
    spelled = rf"[\"'\[ |]{reason}[\"'\] |(:]"
    named = rf"|Reason\.{Reason(reason).name}\b" if reason in set(Reason) else ""
    assert re.search(spelled + named, source())


def test_every_metric_is_described() -> None:
    registries = (
        operator.Metrics(Cache(), lambda: operator.LoopHealth(0, 0, 0, True)).registry,
        agent.Metrics().registry,
        coordinator.Metrics().registry,
        replication.Metrics().registry,
        BinderMetrics().registry,
    )
    endings = {"counter": "_total", "info": "_info"}
    families = [family for registry in registries for family in registry.collect()]
    there = {family.name + endings.get(family.type, "") for family in families}
    cells = re.findall(
        r"^\| (`hotweights_.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert described == there


def test_blocks_are_read_as_they_stand() -> None:
    read = {str(block): block for document in docs.RUN for block in docs.blocks(document)}
    assert all(block.text.strip() for block in read.values())
    assert len(docs.runnable()) + len(docs.not_run()) == sum(
        block.is_commands for block in read.values()
    )
    assert all(block.not_run != "" for block in docs.not_run())
    assert {"docs/install.md", "docs/troubleshooting.md", "config/samples/README.md"} <= {
        b.document for b in docs.runnable()
    }


def test_commands_are_found_in_pipes_quotes_and_substitutions() -> None:
    text = (
        "pod=$(kubectl get pods -o name | head -1)  # a pod's name\nhelm upgrade \\\n  --set "
        "'a={b}' && make test\n"
    )
    assert [" ".join(words) for words in docs.commands(text)] == [
        "pod=$",
        "kubectl get pods -o name",
        "head -1",
        "helm upgrade --set a={b}",
        "make test",
    ]
    with pytest.raises(ValueError, match="never closed"):
        list(docs.commands("echo 'x"))


def test_a_console_shows_commands_and_what_they_print() -> None:
    block = docs.Block(
        "x.md",
        1,
        "console",
        "$ kubectl get wroll\nNAME  VERSION\na     v1\n\n$ kubectl get wver\n",
        "",
    )
    assert block.shown == [
        ("kubectl get wroll", "NAME  VERSION\na     v1"),
        ("kubectl get wver", ""),
    ]
    assert block.script == "kubectl get wroll\nkubectl get wver\n"


def test_the_outline_of_what_is_shown_is_never_nothing() -> None:
    assert docs.outline("NAME  VERSION\na     v1\n") == ["NAME", "VERSION"]
    assert docs.outline("Name:  a\nSpec:\n  Paused:  false\nEvents:\n") == [
        "Name",
        "Spec",
        "Events",
    ]
    assert docs.outline("weightrollout.hotweights.dev/a patched\n") == []
    shown = [(block, out) for block in docs.runnable() for _, out in block.shown if out]
    assert len(shown) >= 6
    for block, out in shown:
        assert docs.outline(out), f"nothing of what {block} shows can be compared"
