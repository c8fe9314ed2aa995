# syntax=docker/dockerfile:1
# The worker's image. Its stages: the packages, the tests, the model (no tests, no model), and what is shipped.
#
#   docker build -t sdworker .                              with SDXL inside
#   docker build -t sdworker --build-arg BAKE=0 .           without a model
#   docker build -t sdworker --secret id=hf_token,src=$HOME/.cache/huggingface/token \
#       --build-arg MODEL_ID=... --build-arg MODEL_REVISION=... .                         a gated model
#   docker build -t sdworker --build-arg AOT=cpu .      with the model compiled
#   docker build -t sdworker --build-arg AOT=cuda --build-arg BASE_IMAGE=... .    for the GPU that the build sees
#   docker build -t sdworker --build-arg COMPILE_CACHE=cpu .    with a cache for torch.compile; cuda: for that GPU
#
# AOT=cuda needs CUDA's headers, which the base below lacks: BASE_IMAGE must have apt-get, Python 3.11 as python3,
# and the toolkit of CUDA 12.8. It is shipped with all that is in it. AOT=cpu takes the base as it is. A few-step model
# whose preset has a sampler of its own, and LoRAs that are not fused (FUSE_LORAS), end the build with that reason.
#
# `make image-test` builds it with buildah 1.28, which knows neither heredocs nor COPY --link.

ARG BASE_IMAGE=python:3.11.14-slim-bookworm
ARG MODEL_ID=stabilityai/stable-diffusion-xl-base-1.0
ARG MODEL_REVISION=462165984030d82259a11f4367a4eed129e94a7b
# Components and LoRAs from elsewhere, as in SDWORKER_ADDONS
ARG ADDONS=
# The scale at which LoRAs among them are added into the weights; empty: they stay adapters
ARG FUSE_LORAS=
# 0: no model in the image; the worker takes RunPod's cached model, or one on a volume, or fetches it
ARG BAKE=1
# What the model is compiled for: cpu, or cuda where the build sees the GPU; empty: not at all
ARG AOT=
# The same for torch.compile's cache (SDWORKER_COMPILE=cached), which brings a C++ compiler into the image
ARG COMPILE_CACHE=

FROM ${BASE_IMAGE} AS base
# Python's own images come without the standard library's bytecode: each start would compile what it imports.
# Such bytecode is taken as it is, so it stays right when a layer's file times are not kept.
RUN python3 -m compileall -q -f -j 0 --invalidation-mode unchecked-hash \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

# The packages, exactly as locked. pip has an environment of its own and is not shipped. All of their files are
# compiled, but one test of torch's that is written for Python 3.12.
FROM base AS deps
ENV PATH=/opt/sdworker/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/sdworker \
    PYTHONUNBUFFERED=1 \
    PIP_CACHE_DIR=/build/pip
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
ARG REQUIREMENTS=.runpod/worker.lock
# Both for a folder of wheels that is mounted into the build, instead of an index.
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
COPY ${REQUIREMENTS} /build/worker.lock
RUN --mount=type=cache,target=/build/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --require-hashes --no-deps --no-compile \
        -r /build/worker.lock \
    && find /opt/venv/lib -type d -name tests -prune -exec rm -r {} + \
    && python -m compileall -q -f -j 0 --invalidation-mode unchecked-hash -x /py312_ /opt/venv/lib

# The notebooks of all that is shipped, and the tests of a worker in its process. What is not shipped, the lab and the
# training of the embedded model, helps these to run and is then removed; `make test-all` tests that too.
FROM deps AS test
ARG TEST_REQUIREMENTS=.runpod/tests.lock
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=
COPY ${TEST_REQUIREMENTS} /build/tests.lock
RUN --mount=type=cache,target=/build/pip \
    /opt/pip/bin/pip --python /opt/venv/bin/python install --require-hashes --no-deps -r /build/tests.lock
COPY . /src
WORKDIR /src
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps --no-build-isolation \
        --no-compile --target /opt/sdworker . \
    && python -m compileall -q -f --invalidation-mode unchecked-hash /opt/sdworker
RUN OMP_NUM_THREADS=1 python -m pytest -x -n 2 nbs --ignore=nbs/8_lab --ignore=nbs/7_embedded/02_training.ipynb \
        --ignore=nbs/7_embedded/03_tiny_models.ipynb tests/test_queue.py tests/test_serve.py tests/test_start.py \
    && rm -r /opt/sdworker/sdworker/lab /opt/sdworker/sdworker/embedded/training.py \
        /opt/sdworker/sdworker/embedded/tiny_models.py /opt/sdworker/sdworker/embedded/__pycache__/training.* \
        /opt/sdworker/sdworker/embedded/__pycache__/tiny_models.* \
    && touch /tests-passed

# The model, fetched or half fetched in a cache that outlives the build, then copied, checked, compiled if that is
# wanted, and parted into layers. The only stage with a compiler, unless COMPILE_CACHE is set.
FROM deps AS bake
ARG AOT
ARG COMPILE_CACHE
# hadolint ignore=DL3008
RUN if [ -n "$AOT$COMPILE_CACHE" ]; then \
        apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ && rm -r /var/lib/apt/lists/*; \
    fi
ARG MODEL_ID
ARG MODEL_REVISION
ARG ADDONS
ARG FUSE_LORAS
ARG BAKE
ARG LAYER_BYTES=3000000000
ARG HF_ENDPOINT=https://huggingface.co
ENV HF_HOME=/build/cache/huggingface \
    HF_HUB_CACHE=/build/cache/huggingface/hub \
    TORCH_HOME=/build/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/opt/compiled/inductor \
    TRITON_CACHE_DIR=/opt/compiled/triton \
    XDG_CACHE_HOME=/build/cache \
    TMPDIR=/build/tmp \
    SDWORKER_AOT_DIR=/opt/compiled/aot \
    SDWORKER_BAKED=/baked/model
COPY --from=test /tests-passed /tests-passed
COPY --from=test /opt/sdworker /opt/sdworker
RUN --mount=type=secret,id=hf_token --mount=type=cache,target=/build/cache \
    mkdir -p "$TMPDIR" "$SDWORKER_AOT_DIR" "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR" \
        /layers/0 /layers/1 /layers/2 /layers/3 /layers/4 /layers/5 /layers/6 /layers/7 \
    && case "$BAKE" in \
    0)  [ -z "$AOT$COMPILE_CACHE" ] \
            || { echo "AOT or COMPILE_CACHE is set, and BAKE is 0: there is no model to compile." >&2; exit 1; } ;; \
    1)  expr "$MODEL_REVISION" : '[0-9a-f]\{40\}$' > /dev/null \
            || { echo "MODEL_REVISION is '$MODEL_REVISION'; it should be a full commit." >&2; exit 1; } \
        && cached="/build/cache/baked/$MODEL_ID@$MODEL_REVISION/$ADDONS/model" \
        && HF_TOKEN_PATH=/run/secrets/hf_token sdworker bake "$MODEL_ID" --revision "$MODEL_REVISION" \
            --addons "$ADDONS" --to "$cached" \
        && sdworker bake "$cached" --to "$SDWORKER_BAKED" ${FUSE_LORAS:+--fuse-loras "$FUSE_LORAS"} \
        && export SDWORKER_MODEL="$MODEL_ID" SDWORKER_OFFLINE=1 \
        && if [ -n "$AOT" ]; then sdworker bake --aot --device "$AOT"; fi \
        && if [ -n "$COMPILE_CACHE" ]; then sdworker bake --compile-cache --device "$COMPILE_CACHE"; fi \
        && python -m sdworker.build.layers "$SDWORKER_BAKED" /layers 8 "$LAYER_BYTES" ;; \
    *)  echo "BAKE is $BAKE; it should be 1 or 0." >&2 && exit 1 ;; \
    esac

# What is shipped: packages, the model's layers, and last the code, which changes most often.
FROM base AS worker
# torch.compile wants its compiler at every start, even where it finds all in its cache.
ARG COMPILE_CACHE
# hadolint ignore=DL3008
RUN mkdir -p /cache/huggingface/hub /cache/torch \
    && if [ -n "$COMPILE_CACHE" ]; then \
        apt-get update -qq && apt-get install -y -qq --no-install-recommends g++ && rm -r /var/lib/apt/lists/*; \
    fi
COPY --from=deps /opt/venv /opt/venv
COPY --from=bake /layers/0/ /model/
COPY --from=bake /layers/1/ /model/
COPY --from=bake /layers/2/ /model/
COPY --from=bake /layers/3/ /model/
COPY --from=bake /layers/4/ /model/
COPY --from=bake /layers/5/ /model/
COPY --from=bake /layers/6/ /model/
COPY --from=bake /layers/7/ /model/
COPY --from=bake /opt/compiled/ /opt/compiled/
COPY --from=test /opt/sdworker /opt/sdworker
ARG MODEL_ID
ARG ADDONS
ARG BAKE
ENV HF_HOME=/cache/huggingface \
    HF_HUB_CACHE=/cache/huggingface/hub \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/opt/compiled/inductor \
    TRITON_CACHE_DIR=/opt/compiled/triton \
    XDG_CACHE_HOME=/cache \
    TMPDIR=/tmp \
    SDWORKER_AOT_DIR=/opt/compiled/aot \
    SDWORKER_BAKED=/model \
    SDWORKER_VOLUME=/runpod-volume
ENV PATH=/opt/sdworker/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/sdworker \
    PYTHONUNBUFFERED=1 \
    SDWORKER_MODEL=$MODEL_ID \
    SDWORKER_ADDONS=$ADDONS \
    SDWORKER_OFFLINE=$BAKE \
    HF_HUB_OFFLINE=$BAKE
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["sdworker", "verify", "--quick"]
STOPSIGNAL SIGTERM
CMD ["sdworker", "start"]
