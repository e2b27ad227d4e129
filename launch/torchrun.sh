#!/usr/bin/env bash
# Train a recipe under torchrun. On several machines, run it on each of them.
#
#   bash launch/torchrun.sh RECIPE [key=value ...]
#
#   RANKS=4          ranks on this machine; default: one per GPU, or 2 without a GPU
#   NODES=2          machines; then also NODE_RANK=0 (1 on the second ...), MASTER_ADDR, MASTER_PORT
#
# More ranks than GPUs share them. Exit code: 1 when a rank failed (torchrun does not pass its code on).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ $# == 0 ]]; then
    echo "usage: bash launch/torchrun.sh RECIPE [key=value ...]" >&2
    exit 2
fi
find_environment
gpus=$(count_gpus)
launcher=(python -m torch.distributed.run --nproc-per-node "${RANKS:-$((gpus > 0 ? gpus : 2))}")
if ((${NODES:-1} > 1)); then
    launcher+=(--nnodes "$NODES" --node-rank "${NODE_RANK:?NODES > 1 needs NODE_RANK}")
    launcher+=(--master-addr "${MASTER_ADDR:?NODES > 1 needs MASTER_ADDR}")
    launcher+=(--master-port "${MASTER_PORT:-29500}")
else
    launcher+=(--standalone)
fi
exec "${launcher[@]}" -m scpl_ds train "$@"
