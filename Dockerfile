# An image for cluster=kubernetes, and for any container runtime:
#   docker build --tag registry/twohop:0.1 .
# PyPI's torch brings CUDA's libraries along; the host only needs its driver. Not the slim image: torch.compile wants a
# C compiler.
FROM python:3.12-bookworm

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

WORKDIR /opt/twohop

# DeepSpeed's source package imports torch while it is built, so torch comes first. Both are here before the project's
# own files, so that a change of those installs neither again.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch setuptools wheel \
    && pip install --constraint constraints.txt --no-build-isolation deepspeed

COPY pyproject.toml README.md LICENSE ./
COPY comm comm
COPY configs configs
COPY models models
COPY trainer trainer
# Runs are not root's: what they write lies in the volume.
RUN pip install --constraint constraints.txt --no-build-isolation '.[optuna]' \
    && useradd --create-home --uid 1000 twohop
USER 1000
WORKDIR /home/twohop

CMD ["twohop", "--help"]
