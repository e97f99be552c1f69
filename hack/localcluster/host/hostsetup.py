"""What a build inside a container must know about this machine: its Debian mirror, its package
index, its CAs.

All of it is found by asking apt and pip, and handed to builds as mounted files, so that nothing of
it is written into this repository or into an image. On a machine without special settings it is all
empty.
"""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path

from localcluster.errors import ClusterError
from localcluster.host.commands import run

DEBIAN_SUITE = "bookworm"
DEBIAN_MIRROR = "http://deb.debian.org/debian"
"""The public one, for machines whose apt knows no mirror of Debian's."""

CONTAINER_AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
CONTAINER_PIP_CONFIG = "/etc/pip.conf"

_PIP_OPTIONS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "cert")
_PROXY_VARIABLES = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)


def debian_mirror() -> str:
    """The mirror of Debian that apt uses here, or the public one."""
    try:
        targets = run(
            ["apt-get", "indextargets", "--format", "$(SUITE) $(CODENAME) $(COMPONENT) $(REPO_URI)"]
        )
    except ClusterError:
        return DEBIAN_MIRROR
    return mirror_among(targets)


def mirror_among(targets: str) -> str:
    """The first repository that has our suite's main component, among `apt-get indextargets`
    lines.
    """
    for line in targets.splitlines():
        suite, codename, component, uri = line.split(" ", 3)
        if (
            DEBIAN_SUITE in (suite, codename)
            and component == "main"
            and uri.rstrip("/").endswith("/debian")
        ):
            return uri.rstrip("/")
    return DEBIAN_MIRROR


def pip_config() -> str:
    """A pip.conf for builds that leads where this machine's pip goes."""
    return render_pip_config(run([sys.executable, "-m", "pip", "config", "list"]))


def render_pip_config(listed: str) -> str:
    """The options of `pip config list` that mean the same inside a container, as pip.conf."""
    options: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, quoted = line.partition("=")
        option = name.rpartition(".")[2].replace("_", "-").removeprefix("default-")
        # The environment's lines win over the files'.
        if option in _PIP_OPTIONS and (option not in options or name.startswith(":env:")):
            options[option] = quoted.strip("'\"").replace("\\n", " ")
    if "cert" in options:
        options["cert"] = CONTAINER_AUTHORITIES  # where the build sees this machine's
    lines = [f"{option} = {value}" for option, value in sorted(options.items())]
    return "\n".join(["[global]", *lines, ""]) if lines else ""


def authorities(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file of certificate authorities that programs here trust, if there is one."""
    named = (
        environment.get("PIP_CERT"),
        environment.get("SSL_CERT_FILE"),
        ssl.get_default_verify_paths().cafile,
    )
    candidates = [*(Path(path) for path in named if path), Path(CONTAINER_AUTHORITIES)]
    return next((path for path in candidates if path.is_file()), None)


def proxies(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The proxy settings of the environment."""
    return {name: environment[name] for name in _PROXY_VARIABLES if environment.get(name)}
