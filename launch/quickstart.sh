#!/usr/bin/env bash
# From nothing to a fine-tuned model: installs, fetches the demo, trains recipes/quickstart.yaml in
# two stages on two ranks, evaluates, exports.
#
#   bash launch/quickstart.sh [key=value ...]
#   bash launch/quickstart.sh train.max_steps=20 train.output_dir=runs/short
#
# Needs Python >= 3.11; a GPU is used when there is one. The first run installs into .venv beside
# the repository, later ones skip that. Overrides are those of `scpl-ds train`; relative paths
# are relative to the repository. Exit code: the run's.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
caller=$PWD
cd "$ROOT"
use_environment wandb,demo
python -m scpl_ds.data.demo >/dev/null

gpus=$(count_gpus)
if [[ $gpus == 0 ]]; then
    export DS_ACCELERATOR=cpu # or DeepSpeed looks for a GPU in every process, and says so
fi
echo "Training recipes/quickstart.yaml in 2 stages on 2 ranks ($gpus GPUs)"
(run_deepspeed 2 train recipes/quickstart.yaml "$@")

run=runs/quickstart
for override in "$@"; do
    case $override in train.output_dir=*) run=${override#*=} ;; esac
done
python launch/summary.py "$run" "$caller"
