# One image with the server and its adapters, and no model in it. The base model (some 270 MB) is fetched
# and converted at the first start into a volume that later starts and other containers share; its
# fingerprint is compared with the adapter's each time. Nothing else is written but /tmp and the state.
#
#   docker build -t dalorra .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 \
#     -v dalorra-models:/var/cache/dalorra -v dalorra-state:/var/lib/dalorra \
#     -v ./keys:/run/keys:ro -e DALORRA_API_KEYS_FILE=/run/keys/api_keys dalorra
#
# It listens on all addresses of the container, so it does not start without API keys (`dalorra keys create`
# makes the file; it must be readable for uid 10001) unless DALORRA_ALLOW_UNAUTHENTICATED=true says that
# only you can reach the published port.
#
# The first start needs a package index; pip inside reads PIP_INDEX_URL and the like. Without a network, fill
# the volume elsewhere (docker run --entrypoint python ... -m dalorra_core.base_models fetch) or mount a model
# directory and name it: docker run ... dalorra serve adapters/clinc150 --host 0.0.0.0 --base /models/mine
#
# Another base image with Python 3.11 or 3.12 and its venv module: --build-arg BASE=...
# Package indexes besides pip's default, such as PyTorch's CPU wheels: --build-arg PIP_EXTRA_INDEX_URL=...
# Build arguments can be read from the build stage's history: put no password into one.
# deploy/image/build_and_try.sh builds this file and tries the result, without Docker.
ARG BASE=python:3.11-slim-bookworm

# --- build: a virtual environment ----------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python3 -m venv /opt/dalorra/venv
ENV PATH=/opt/dalorra/venv/bin:${PATH}

# torch alone first: the largest layer, and the one that changes least. The CPU build where an index has
# it; --build-arg TORCH_BUILD= takes the default build, for CUDA.
COPY constraints.txt ./
ARG TORCH_BUILD=+cpu
RUN version=$(sed -n 's/^torch==//p' constraints.txt) \
    && { pip install "torch==${version}${TORCH_BUILD}" -c constraints.txt \
      || { echo "no build torch ${version}${TORCH_BUILD} found: taking the default build" >&2; \
           pip install "torch==${version}" -c constraints.txt; }; }

COPY pyproject.toml README.md LICENSE ./
COPY dalorra ./dalorra
COPY dalorra_core ./dalorra_core
COPY server ./server
# With what settings may ask for: feedback in PostgreSQL, signed adapters, traces.
RUN pip install -c constraints.txt '.[postgresql,sign,otel]'

# --- what runs -----------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS run
ARG GIT_SHA=unknown
ENV PATH=/opt/dalorra/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    DALORRA_CACHE=/var/cache/dalorra \
    DALORRA_STATE_DIR=/var/lib/dalorra \
    DALORRA_GIT_SHA=${GIT_SHA}
# New volumes take their owner from here: the two places that the server writes.
RUN install -d -o 10001 -g 10001 -m 0755 /var/cache/dalorra \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/dalorra
VOLUME ["/var/cache/dalorra", "/var/lib/dalorra"]
COPY --from=build /opt/dalorra /opt/dalorra
COPY adapters /opt/dalorra/adapters
WORKDIR /opt/dalorra
# A number, so that Kubernetes can check runAsNonRoot. It owns nothing under /opt.
USER 10001:10001
EXPOSE 8000
# Alive, not ready: the first start may spend minutes on the model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["dalorra"]
CMD ["serve", "adapters/clinc150-fast", "--host", "0.0.0.0", "--port", "8000"]
