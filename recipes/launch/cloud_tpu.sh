#!/bin/bash
# JAX on a Cloud TPU pod, one process on each of its hosts. Not run on a TPU; tested is what it starts.
#
#     recipes/launch/cloud_tpu.sh NAME ZONE imagenet1k_convnext_tiny /mnt/shared/imagenet /mnt/shared/runs/tiny
#
# NAME is a slice that is there (`gcloud compute tpus tpu-vm create`), with the package and `jax[tpu]` on each host.
# JAX finds the other hosts by itself (docs.jax.dev, "Multi-controller JAX"). The folder of the run must be the same
# on all hosts. gcloud: cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh

set -euo pipefail
name=$1 zone=$2 recipe=$3 data=$4 out=$5

printf -v command 'KERAS_BACKEND=jax KERAS_CONVNEXT_PROCESSES=auto keras-convnext train %q --data %q --out %q --distribute data_parallel' \
    "$recipe" "$data" "$out"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
