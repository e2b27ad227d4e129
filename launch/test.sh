#!/usr/bin/env bash
# Installs the test extras into .venv and runs the whole suite; half an hour on two cores.
#
#   bash launch/test.sh [pytest arguments]
#   bash launch/test.sh tests/unit -k schedule
#   bash launch/test.sh tests/unit -k schedule -n 0 --pdb
#
# Paths are relative to the repository. Slow tests: -m slow. Nothing outside the repository is
# needed but a package index, for the installation and the demo.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"
use_environment wandb,tensorboard,mlflow,demo,lora,qlora,docs,dev
python -m scpl_ds.data.demo >/dev/null
python -m scpl_ds.data.demo_lm >/dev/null
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share the cores
# Files run side by side, what forks ranks before what starts threads (tests/conftest.py).
exec python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder "$@"
