# The image of the worker and of every other command, in two targets: `cpu`, the default, and `cuda`.
#
#   docker build --tag tokenmill:cpu .
#   docker build --tag tokenmill:cuda --target cuda .
#
# Layers are ordered by how rarely they change: Python, then torch and all else that constraints.txt pins, then our wheel.
# A change of the code makes the wheel anew and one last layer of two megabytes.
#
# hadolint takes the TOKEN in TOKENMILL for a secret:
# hadolint global ignore=DL3064

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ------------------------------------------------------------------------------------------------------ tools of the build
FROM ${PYTHON_IMAGE} AS uv
ARG UV_VERSION=0.13.9
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --root-user-action=ignore --disable-pip-version-check "uv==${UV_VERSION}"

FROM uv AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY schemas schemas
COPY kernels kernels
COPY engine engine
COPY worker worker
RUN --mount=type=cache,target=/root/.cache/uv uv build --quiet --wheel --out-dir /dist

# What we depend on, and nothing else that pyproject.toml says: a change of the linter's rules installs no torch.
FROM uv AS requirements
RUN --mount=type=bind,source=pyproject.toml,target=/src/pyproject.toml \
    python -c "import tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['demo'], sep='\n')" > /requirements.txt

# ------------------------------------------------------------------------------------------------------ what others made
FROM ${PYTHON_IMAGE} AS base
# tini passes signals on: process 1 would not hear one that it has no handler for, and a stop while loading would be a kill.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# Fetched models have a folder of their own: a volume that is first mounted there becomes this user's.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/tokenmill --shell /usr/sbin/nologin tokenmill \
    && install --directory --owner tokenmill --group tokenmill /var/cache/tokenmill

FROM base AS dependencies
# PyPI's torch runs on both kinds of device and brings 3 GB of CUDA along. A CPU image can do without them: name the index
# of PyTorch's CPU-only builds here. Nothing but torch is taken from there.
ARG TORCH_INDEX=""
# Compiled now: with the file system read-only, every start would compile torch's 2,000 modules again.
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
RUN --mount=type=bind,from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    --mount=type=bind,from=requirements,source=/requirements.txt,target=/src/requirements.txt \
    --mount=type=bind,source=constraints.txt,target=/src/constraints.txt \
    --mount=type=cache,target=/root/.cache/uv \
    uv venv --quiet /opt/tokenmill \
    && export VIRTUAL_ENV=/opt/tokenmill UV_CONSTRAINT=/src/constraints.txt \
    && if [ -n "${TORCH_INDEX}" ]; then uv pip install --no-deps --default-index "${TORCH_INDEX}" torch; fi \
    && uv pip install --requirement /src/requirements.txt

# The CPU kernels are compiled here, for this torch; the image itself has no compiler.
FROM dependencies AS kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY kernels kernels
RUN mkdir -p /opt/tokenmill/share/tokenmill && /opt/tokenmill/bin/python -m kernels.cpu.native

# ------------------------------------------------------------------------------------------------------ what we made
FROM dependencies AS tokenmill
COPY --from=kernels /opt/tokenmill/share/tokenmill /opt/tokenmill/share/tokenmill
RUN --mount=type=bind,from=uv,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    --mount=type=bind,from=wheel,source=/dist,target=/dist \
    VIRTUAL_ENV=/opt/tokenmill uv pip install --quiet --no-cache --no-deps /dist/*.whl
USER 10001:10001
WORKDIR /var/cache/tokenmill
ENV PATH=/opt/tokenmill/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/var/cache \
    HF_HUB_OFFLINE=1 \
    TOKENMILL_HEALTH_HOST=0.0.0.0
EXPOSE 9464

# Loading a model takes from seconds to minutes; a worker that is ready sooner is seen within three seconds.
HEALTHCHECK --interval=15s --timeout=5s --retries=3 --start-period=5m --start-interval=3s CMD ["tokenmill", "healthcheck"]
ENTRYPOINT ["tini", "--", "tokenmill"]
CMD ["worker"]

LABEL org.opencontainers.image.title="tokenmill" \
      org.opencontainers.image.description="LLM requests from Kafka, completions and their bill exactly once" \
      org.opencontainers.image.licenses="Apache-2.0"

# Triton compiles each kernel's launcher, some lines of C, when the kernel is first used, and keeps both in its cache.
FROM tokenmill AS cuda
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner tokenmill --group tokenmill /var/cache/kernels
USER 10001:10001
ENV TOKENMILL_ENGINE_DEVICE=cuda NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/var/cache/kernels \
    TRITON_DEFAULT_FP_FUSION=1

FROM tokenmill AS cpu
ENV TOKENMILL_ENGINE_DEVICE=cpu
