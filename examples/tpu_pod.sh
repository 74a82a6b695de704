#!/bin/bash
# ImageNet on all hosts of a TPU pod slice: one process per host, which find each other through the slice.
#
#   TPU=NAME ZONE=ZONE bash examples/tpu_pod.sh [--config.NAME=VALUE ...]
#
# Every host has this project in ~/cnn_jax, installed by `pip install '.[tpu]'`, and the prepared imagenet2012 in DATA, for
# example on a disk that is attached to all of them for reading. The first host keeps the workdir; the same command continues.
set -eu
DATA="${DATA:-/mnt/disks/data/tensorflow_datasets}"
arguments=(
  --config="${CONFIG:-configs/imagenet.py}"
  --workdir="${WORKDIR:-runs/imagenet}"
  --config.data.workers=32
  --join_seconds=300
  "$@"
)
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd cnn_jax && TFDS_DATA_DIR=$DATA python3 -m cnn_jax.main $(printf '%q ' "${arguments[@]}")"
