# One image with the server, its adapters and the base model: it starts without a network and with a
# read-only file system. The base model (some 270 MB) is fetched and converted while the image is built,
# so that every replica of an image computes with the same bytes.
#
#   docker build -t dalorra .
#   docker run --rm -p 127.0.0.1:8000:8000 dalorra
#
# Another base image with Python 3.11 or 3.12 and its venv module: --build-arg BASE=...
# Package indexes besides pip's default, such as PyTorch's CPU wheels: --build-arg PIP_EXTRA_INDEX_URL=...
# Build arguments can be read from the build stage's history: put no password into one.
ARG BASE=python:3.11-slim-bookworm

# --- build: a virtual environment, and the base model ------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1
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
COPY dalorra_core ./dalorra_core
COPY server ./server
RUN pip install -c constraints.txt .
# A layer of its own, so that a failed download does not repeat the installation.
# hadolint ignore=DL3059
RUN DALORRA_CACHE=/opt/dalorra/cache python -m dalorra_core.base_models fetch

# --- what runs -----------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS run
ARG GIT_SHA=unknown
ENV PATH=/opt/dalorra/venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    DALORRA_CACHE=/opt/dalorra/cache \
    DALORRA_GIT_SHA=${GIT_SHA}
COPY --from=build /opt/dalorra /opt/dalorra
COPY adapters /opt/dalorra/adapters
WORKDIR /opt/dalorra
# A number, so that Kubernetes can check runAsNonRoot. Nothing the server runs is writable for it.
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/live', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["dalorra"]
CMD ["serve", "adapters/clinc150", "--host", "0.0.0.0", "--port", "8000"]
