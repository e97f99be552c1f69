"""Rights count a moment after the API server took them, and go a moment after it was told so: its
authorizer reads bindings by a watch. A test that gives or takes some waits until that has come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

SECONDS = 60.0


def wait_for_right(
    kubectl: Callable[..., str],
    account: str,
    right: tuple[str, str],
    *,
    namespace: str = "",
    granted: bool = True,
) -> None:
    """Ask, as the admin, whether a service account (`namespace:name`) may do (verb, group/resource)
    in a namespace, or in all of them, until the answer is `granted`.
    """
    verb, resource = right
    group, _, plural = resource.rpartition("/")
    attributes = {"verb": verb, "group": group, "resource": plural, "namespace": namespace}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": f"system:serviceaccount:{account}", "resourceAttributes": attributes},
    }
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        answer = json.loads(kubectl("create", "-f", "-", "-o", "json", text=json.dumps(review)))
        if answer["status"]["allowed"] == granted:
            return
    raise TimeoutError(f"{account} may{' not' if granted else ''} {verb} {resource} all the same")
