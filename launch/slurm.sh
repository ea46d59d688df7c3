#!/bin/bash
# One training run as a Slurm job on four nodes of eight GPUs. Copy it and change what differs.
#     launch/slurm.sh RUN.yaml [more flags of bigtrain launch, such as --dry-run]
set -euo pipefail

exec bigtrain launch "${1:?name a run file}" --slurm \
  --nodes 4 --procs-per-node 8 \
  --partition gpu --time 24:00:00 \
  --sbatch exclusive \
  "${@:2}"
