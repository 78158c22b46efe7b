# deit-fast for training on NVIDIA GPUs, also on machines without one.
#
#   docker build --tag deit-fast .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --env HOME=/tmp \
#     --volume "$PWD:/work" deit-fast doctor
#
# The loader's processes pass images through shared memory: without --shm-size Docker gives 64 MB. For
# several GPUs: --entrypoint torchrun deit-fast --nproc-per-node 8 -m deit_fast train ...
# The driver must support CUDA 13 (r580 or newer). To build the same image again later, pin both base
# images by digest: docker build --build-arg UBUNTU_IMAGE=ubuntu@sha256:... --build-arg CUDA_IMAGE=...
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG UBUNTU_IMAGE=ubuntu:24.04

FROM ${CUDA_IMAGE} AS wheel
# Versions are not pinned: Ubuntu's index holds the newest alone.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/build \
 && DEIT_FAST_CUDA=1 /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${UBUNTU_IMAGE}
# Triton and Inductor compile while a training runs: they need a compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
RUN python3 -m venv /opt/deit-fast \
 && /opt/deit-fast/bin/pip install --no-cache-dir "$(echo /wheels/*.whl)[dali]"
ENV PATH=/opt/deit-fast/bin:$PATH
WORKDIR /work
# The user `ubuntu` of the base image.
USER 1000:1000
ENTRYPOINT ["deit-fast"]
CMD ["--help"]
