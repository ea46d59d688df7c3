#!/bin/bash
# A Slurm job inside a container image, where the cluster has pyxis. The image needs bigtrain.
#     IMAGE=registry/image:tag launch/slurm_container.sh RUN.yaml [more flags]
set -euo pipefail

exec bigtrain launch "${1:?name a run file}" --slurm \
  --nodes 2 --procs-per-node 8 --time 24:00:00 \
  --container-image "${IMAGE:?name the image}" \
  --sbatch container-mounts="$PWD:$PWD" --sbatch container-workdir="$PWD" \
  "${@:2}"
