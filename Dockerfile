# Two images: `api` (no PyTorch) and `worker` (EXTRAS=worker, or worker,gpu with CuPy for NVIDIA cards).
#
# BASE_IMAGE is any Debian, with or without Python 3.11+. Packages come from where pip looks by default;
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL name other indexes. The default index gives PyTorch with CUDA, some GB;
# an extra index of CPU builds makes a much smaller worker for machines without a GPU.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS python
RUN command -v python3 || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; }

# ---- What is built: dependencies in /opt/venv, this project in /opt/aquant, so that a change of the code
# ---- rebuilds and ships only the second.
FROM python AS builder
RUN python3 -c "import ensurepip" || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; }
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The tools stay in their own environment. The wheel has the project's metadata and no code: enough to install
# the dependencies of an extra.
RUN --mount=type=cache,target=/var/cache/pip \
    python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install -c constraints.txt setuptools \
    && python3 -m venv --without-pip /opt/venv \
    && touch README.md LICENSE \
    && /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/metadata .

FROM builder AS project
COPY README.md LICENSE ./
COPY cupy_kernels cupy_kernels
COPY aquant_core aquant_core
COPY service service
COPY worker worker
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels . \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install --no-deps --no-index --target /opt/aquant \
        /opt/wheels/*.whl

FROM builder AS api-dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/tools/bin/pip --python /opt/venv/bin/python install -c constraints.txt \
        "$(echo /opt/metadata/*.whl)[server,telemetry]" \
    && /opt/tools/bin/pip --python /opt/venv/bin/python uninstall -y aquant-service

FROM builder AS worker-dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=worker
RUN --mount=type=cache,target=/var/cache/pip \
    /opt/tools/bin/pip --python /opt/venv/bin/python install -c constraints.txt \
        "$(echo /opt/metadata/*.whl)[${EXTRAS},telemetry]" \
    && /opt/tools/bin/pip --python /opt/venv/bin/python uninstall -y aquant-service

# ---- What runs: one fixed user, who owns the data and nothing else. The root may be mounted read-only if /tmp
# ---- is writable.
FROM python AS runtime
RUN groupadd --gid 10001 aquant \
    && useradd --uid 10001 --gid aquant --no-create-home --home-dir /tmp --shell /usr/sbin/nologin aquant \
    && install -d -o aquant -g aquant -m 0750 /data /data/work
ENV PATH=/opt/venv/bin:/opt/aquant/bin:$PATH \
    PYTHONPATH=/opt/aquant \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    AQUANT_DATA_DIR=/data
WORKDIR /data

FROM runtime AS api
# Where the compose file's service `secrets` finds its volumes: an empty one takes its owner from here.
RUN install -d -o aquant -g aquant -m 0750 /volumes/seed /volumes/aquant /volumes/postgres /volumes/redis /volumes/s3 \
        /volumes/store
COPY --from=api-dependencies /opt/venv /opt/venv
COPY --from=project /opt/aquant /opt/aquant
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD python -c "from http.client import HTTPConnection; \
    connection = HTTPConnection('127.0.0.1', 8000, timeout=4); \
    connection.request('GET', '/health/ready'); \
    raise SystemExit(connection.getresponse().status != 200)"
CMD ["python", "-m", "uvicorn", "--factory", "service.main:application", "--host", "0.0.0.0", "--port", "8000", \
     "--timeout-graceful-shutdown", "3", "--no-access-log"]

FROM runtime AS worker
# numba's threads are OpenMP's; without the library it falls back on ones that must not be started twice.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY --from=project /opt/aquant /opt/aquant
# Compiled kernels are kept beside the jobs' working files. OpenMP threads that wait should sleep, not spin.
# SIGTERM ends the worker soon, instead of after its job, which it hands on.
ENV NUMBA_CACHE_DIR=$AQUANT_DATA_DIR/work/cache/numba \
    CUPY_CACHE_DIR=$AQUANT_DATA_DIR/work/cache/cupy \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    OMP_WAIT_POLICY=PASSIVE \
    REMAP_SIGTERM=SIGQUIT
USER 10001:10001
# Its sign of life in the database, which it writes busy or not.
HEALTHCHECK --interval=30s --timeout=25s --start-period=60s --retries=3 CMD python -m worker.health
# Celery's level is that of what it writes past the log.
CMD ["python", "-m", "celery", "--quiet", "-A", "worker.celery_app", "worker", "--without-gossip", "--without-mingle", \
     "--loglevel", "WARNING"]
