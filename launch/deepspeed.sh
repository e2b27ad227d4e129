#!/usr/bin/env bash
# Train a recipe under DeepSpeed's launcher.
#
#   bash launch/deepspeed.sh RECIPE [key=value ...]
#
#   RANKS=4             ranks on each machine; default: one per GPU, or 2 without a GPU
#   HOSTFILE=hosts.txt  several machines, a line each: `name slots=8`; needs passwordless ssh and pdsh
#   MASTER_PORT=29501   default: a free one; 29500 with several machines
#
# More ranks than GPUs share them. Exit code: the run's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ $# == 0 ]]; then
    echo "usage: bash launch/deepspeed.sh RECIPE [key=value ...]" >&2
    exit 2
fi
find_environment
gpus=$(count_gpus)
if [[ $gpus == 0 ]]; then
    export DS_ACCELERATOR=cpu
fi
if [[ -z ${HOSTFILE:-} ]]; then
    run_deepspeed "${RANKS:-$((gpus > 0 ? gpus : 2))}" train "$@"
fi
launcher=(python -m deepspeed.launcher.runner)
launcher+=(--hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${RANKS:-} ]]; then
    launcher+=(--num_gpus "$RANKS")
fi
exec "${launcher[@]}" --no_local_rank --module scpl_ds train "$@"
