#!/bin/bash
# ImageNet on one machine with several GPUs: one process uses all of them.
#
#   TFDS_DATA_DIR=DIR bash examples/eight_gpus.sh [--config.NAME=VALUE ...]
#
# DIR holds a prepared imagenet2012. Eight processes read and decode; the same command continues a run that was stopped.
set -eu
export TFDS_DATA_DIR="${TFDS_DATA_DIR:-$HOME/tensorflow_datasets}"
exec python -m cnn_jax.main \
  --config="${CONFIG:-configs/imagenet.py}" \
  --workdir="${WORKDIR:-runs/imagenet}" \
  --config.data.workers=8 \
  "$@"
