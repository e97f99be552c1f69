"""A thin asynchronous face of the Kubernetes API, shared by operator and agent.

`client.Api` asks, `watch.watch` follows, `events.Recorder` tells, `token_review.review` checks who
somebody is. All of them take and give plain dicts and raise only what `errors` lists.
"""

from hotweights_kube.client import Api, Listing, Selection
from hotweights_kube.errors import (
    AlreadyExists,
    Conflict,
    Expired,
    Forbidden,
    Invalid,
    KubeError,
    NotConfigured,
    NotFound,
    TokenRefused,
    Unavailable,
)
from hotweights_kube.events import Notice, Recorder, Reference
from hotweights_kube.resources import (
    EVENTS,
    NODE_WEIGHTS,
    NODES,
    PODS,
    WEIGHT_ROLLOUTS,
    WEIGHT_VERSIONS,
    Body,
    Resource,
)
from hotweights_kube.token_review import Identity, review
from hotweights_kube.watch import Change, WatchTiming, watch

__all__ = [
    "EVENTS",
    "NODES",
    "NODE_WEIGHTS",
    "PODS",
    "WEIGHT_ROLLOUTS",
    "WEIGHT_VERSIONS",
    "AlreadyExists",
    "Api",
    "Body",
    "Change",
    "Conflict",
    "Expired",
    "Forbidden",
    "Identity",
    "Invalid",
    "KubeError",
    "Listing",
    "NotConfigured",
    "NotFound",
    "Notice",
    "Recorder",
    "Reference",
    "Resource",
    "Selection",
    "TokenRefused",
    "Unavailable",
    "WatchTiming",
    "review",
    "watch",
]
