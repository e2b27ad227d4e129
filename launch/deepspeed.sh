#!/usr/bin/env bash
# Train a recipe under DeepSpeed's launcher.
#
#   bash launch/deepspeed.sh RECIPE [key=value ...]
#
#   RANKS=4             ranks on each machine; default: one per GPU, or 2 without a GPU
#   HOSTFILE=hosts.txt  several machines, a line each: `name slots=8`; needs passwordless ssh and pdsh
#   INCLUDE=a:0,1@b     of the hostfile's machines and GPUs, these
#   NODE_RANK=0         no ssh: run this on every machine, with its number in the hostfile; needs MASTER_ADDR
#   LAUNCHER=slurm      srun starts the ranks, inside `salloc` or `sbatch` (launch/slurm.sbatch needs no hostfile)
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
if [[ -n ${INCLUDE:-} ]]; then
    launcher+=(--include "$INCLUDE")
fi
if [[ -n ${NODE_RANK:-} ]]; then
    launcher+=(--no_ssh --node_rank "$NODE_RANK")
    launcher+=(--master_addr "${MASTER_ADDR:?NODE_RANK needs MASTER_ADDR}")
elif [[ -n ${MASTER_ADDR:-} ]]; then
    launcher+=(--master_addr "$MASTER_ADDR")
fi
if [[ ${LAUNCHER:-} == slurm ]]; then
    # srun starts a file, not a module. --force_multi: or one machine is started without srun.
    file=$(python -c 'import importlib.util as u; print(u.find_spec("scpl_ds.__main__").origin)')
    exec "${launcher[@]}" --launcher slurm --force_multi --no_local_rank "$file" train "$@"
fi
exec "${launcher[@]}" --no_local_rank --module scpl_ds train "$@"
