# Orthogon in an image. From the root of the repository:
#   docker build --build-arg DEVICE=cpu  --build-arg COMMIT="$(git rev-parse HEAD)" -t orthogon:cpu .
#   docker build --build-arg DEVICE=cuda --build-arg COMMIT="$(git rev-parse HEAD)" -t orthogon:cuda .
# See docker/README.md.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=cpu
# Extras of pyproject.toml, e.g. "tensorboard,wandb".
ARG EXTRAS=""
# Where torch for CPUs comes from; the package index has the one for CUDA, with its libraries.
ARG CPU_WHEELS=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/orthogon
ENV PATH=/opt/orthogon/bin:$PATH
WORKDIR /build
COPY constraints.txt .
# torch first: the largest layer changes least. Its own needs follow, pinned, from the package index.
RUN case "$DEVICE" in \
        cpu) pip install --constraint constraints.txt --no-deps --index-url "$CPU_WHEELS" torch ;; \
        cuda) pip install --constraint constraints.txt torch ;; \
        *) echo "DEVICE is '$DEVICE'; use cpu or cuda" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md ./
COPY trainer trainer
COPY launch launch
RUN pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" && pip check

FROM ${PYTHON_IMAGE}
ARG COMMIT=""
# Further Debian packages, e.g. g++ for torch.compile.
ARG PACKAGES=""
LABEL org.opencontainers.image.title="orthogon" org.opencontainers.image.revision="$COMMIT"
# tini is process 1: it passes signals on, and buries what the launcher's processes leave.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini $PACKAGES \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home orthogon \
    && install --directory --owner=orthogon --group=orthogon /work
COPY --from=build /opt/orthogon /opt/orthogon
COPY configs /opt/orthogon/configs
COPY --chmod=755 docker/entrypoint /usr/local/bin/entrypoint
ENV PATH=/opt/orthogon/bin:$PATH PYTHONUNBUFFERED=1 ORTHOGON_COMMIT=$COMMIT
USER 1000:1000
WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "--", "/usr/local/bin/entrypoint"]
CMD ["--help"]
