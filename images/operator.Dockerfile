# The operator. Build from the repository's root: buildah bud -f images/operator.Dockerfile .
# The base may be any image with Python 3.11 or later and its venv module. Where pip needs a configuration or a CA bundle, mount
# them; they stay out of the layers: --secret id=pip,src=pip.conf --secret id=ca,src=ca.crt
ARG BASE=docker.io/library/python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY crds crds
COPY kube kube
COPY planner planner
COPY transports transports
COPY agent agent
COPY operator operator
COPY hotweights hotweights
RUN --mount=type=secret,id=pip,target=/run/secrets/pip.conf --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    if [ -s /run/secrets/pip.conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip.conf; fi; \
    if [ -s /run/secrets/ca.crt ]; then export PIP_CERT=/run/secrets/ca.crt; fi; \
    python3 -m venv /pip && python3 -m venv --without-pip /opt/hotweights/venv \
    && /pip/bin/pip --python /opt/hotweights/venv/bin/python install --no-cache-dir ".[operator]"

FROM ${BASE}
COPY --from=build /opt/hotweights /opt/hotweights
ENV PATH=/opt/hotweights/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=hotweights
# Nobody in particular: kopf asks for the name of the user, which no passwd has; hence USER above.
USER 65532:65532
ENTRYPOINT ["python", "-m", "hotweights_operator"]
