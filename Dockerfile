# One image for the flows, the worker, the services and the model server: see docs/container.md.

ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# git: a recorded run is a DVC experiment, and that is a commit
RUN apt-get update \
 && apt-get install -y --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 voc \
 && install --directory --owner voc --group voc /app /work \
 && git config --system user.name voc \
 && git config --system user.email voc@localhost

# another index for torch and torchvision, which then bring the CUDA packages that they need, or none
ARG TORCH_INDEX=
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_UI_STATIC_DIRECTORY=/tmp/prefect-ui
COPY requirements.lock /tmp/
# An entry of the lock begins at the margin, and its hashes follow, indented. Left out are the packages that only
# developers run and, with TORCH_INDEX, what comes from there: its files have other hashes. The lock names every
# dependency, so pip need not look for more.
RUN python3 -m venv /opt/venv \
 && developers='import-linter|kornia|mypy|pandas-stubs|playwright|pytest|pytest-xdist|ruff|schemathesis|types-[a-z]+' \
 && torch='torch|torchvision|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+' \
 && awk -v "left_out=^($developers${TORCH_INDEX:+|$torch})==" '/^[^ ]/ { keep = $0 !~ left_out } keep' \
    /tmp/requirements.lock > /tmp/requirements.txt \
 && python -m pip install --no-cache-dir --require-hashes --no-deps -r /tmp/requirements.txt \
 && if [ -n "$TORCH_INDEX" ]; then \
      python -m pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
        $(sed -nE 's/^((torch|torchvision)==[^ ]+).*/\1/p' /tmp/requirements.lock); \
    fi \
 && python -m pip check \
 && rm /tmp/requirements.*

WORKDIR /app
COPY --chown=voc:voc . .
USER voc
# the code's revision, for the message of the commit that runs in this image start from
ARG REVISION=unknown
RUN git init --quiet && git add --all && git commit --quiet --message "Image of $REVISION"

EXPOSE 8000
# of the model server, which is the default; the other roles have their own in compose.yaml
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "serving", "--host", "0.0.0.0"]
