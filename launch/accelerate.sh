#!/usr/bin/env bash
# Train a recipe under accelerate's launcher.
#
#   bash launch/accelerate.sh RECIPE [key=value ...]
#
#   RANKS=4                    ranks on this machine; default: one per GPU, or 2 without a GPU
#   CONFIG=accelerate.yaml     a file of `accelerate config`; default: launch/accelerate.yaml
#   MASTER_PORT=29501          default: a free one
#
# Of the file only where ranks run matters (machines, processes, addresses, cpu): sharding, precision
# and accumulation are the recipe's. Exit code: 1 when a rank failed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ $# == 0 ]]; then
    echo "usage: bash launch/accelerate.sh RECIPE [key=value ...]" >&2
    exit 2
fi
find_environment
launcher=(python -m accelerate.commands.launch)
if [[ -n ${CONFIG:-} ]]; then
    launcher+=(--config_file "$CONFIG")
else
    gpus=$(count_gpus)
    launcher+=(--config_file "$ROOT/launch/accelerate.yaml")
    launcher+=(--num_processes "${RANKS:-$((gpus > 0 ? gpus : 2))}")
    launcher+=(--main_process_port "${MASTER_PORT:-$(free_port)}")
    if [[ $gpus == 0 ]]; then
        export DS_ACCELERATOR=cpu # and no --cpu: with it accelerate starts one process, or wants MPI
    fi
fi
exec "${launcher[@]}" -m scpl_ds train "$@"
