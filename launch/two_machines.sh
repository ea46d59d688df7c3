#!/bin/bash
# Two machines without Slurm. On each of them, with its own NODE_RANK and the same HEAD:
#     HEAD=machine0:29400 NODE_RANK=0 launch/two_machines.sh RUN.yaml [more flags]
#     HEAD=machine0:29400 NODE_RANK=1 launch/two_machines.sh RUN.yaml [more flags]
set -euo pipefail

exec bigtrain launch "${1:?name a run file}" \
  --nodes 2 --procs-per-node "${PROCS:-8}" \
  --node-rank "${NODE_RANK:?0 or 1}" --rdzv-endpoint "${HEAD:?HOST:PORT of machine 0}" \
  "${@:2}"
