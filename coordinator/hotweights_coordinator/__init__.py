"""The coordinator: who takes part in an update, and what is decided, for hosts without Kubernetes.

``state`` decides and knows no I/O; ``server`` waits for sockets; ``backend`` says what keeps state;
``client`` asks. Bytes of weights never pass through here: workers fetch them from the source and
from each other.
"""
