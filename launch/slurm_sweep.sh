#!/bin/bash
# Six runs that differ in two values, as one Slurm job array: a node of eight GPUs for each.
#     launch/slurm_sweep.sh RUN.yaml [more flags of bigtrain launch, such as --dry-run]
set -euo pipefail

exec bigtrain launch "${1:?name a run file}" --slurm \
  --procs-per-node 8 --time 4:00:00 \
  --sweep training.learning_rate=1e-4,3e-4,1e-3 \
  --sweep training.weight_decay=0.0,0.1 \
  "${@:2}"
