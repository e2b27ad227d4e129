# Sourced by the other scripts. Where the Python environment is, and how it is made.
#
#   PYTHON=python3.12        the Python that makes .venv, a name or a path; default: the first on
#                            PATH that is >= 3.11
#   SCPL_DS_VENV=/some/venv  use this environment as it is and install nothing
#
#   TORCH_CPU_INDEX=URL      where torch's CPU build is taken from on a machine without a GPU
#
# pip's own variables and files work: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ... With any
# of these torch comes from there too.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${SCPL_DS_VENV:-$ROOT/.venv}
OURS=scpl_ds-made-here.stamp
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

# find_environment: put an environment that is already there first on PATH; without one, what the
# caller has activated is used. Either must have scpl_ds in it.
find_environment() {
    if [[ -x $VENV/bin/python ]]; then
        export PATH=$VENV/bin:$PATH VIRTUAL_ENV=$VENV
    elif [[ -n ${SCPL_DS_VENV:-} ]]; then
        echo "SCPL_DS_VENV=$SCPL_DS_VENV has no bin/python. Point it at a virtual environment, or" \
            "unset it." >&2
        return 2
    fi
    # Looked for, not imported: torch takes seconds. torch too, because in the repository scpl_ds is
    # found by any Python.
    if ! python -c 'import sys
from importlib.util import find_spec
sys.exit(not all(map(find_spec, ("scpl_ds", "torch", "deepspeed"))))' 2>/dev/null; then
        echo "scpl_ds is not installed for $(command -v python || echo "python (there is none on PATH)")." \
            "Run \`bash $ROOT/launch/quickstart.sh\`, which makes $ROOT/.venv, or point" \
            "SCPL_DS_VENV at an environment that has it." >&2
        return 2
    fi
}

# use_environment EXTRAS: as above, but make it and install `scpl-ds[EXTRAS]` where needed.
# What is installed is stamped, so a second call takes no time.
use_environment() {
    local extras=$1
    if [[ -z ${SCPL_DS_VENV:-} ]] && ! is_installed "$extras"; then
        install "$extras"
    fi
    find_environment
}

is_installed() {
    local extra
    "$VENV/bin/python" -c '' 2>/dev/null || return 1
    for extra in ${1//,/ }; do
        [[ $(cat "$VENV/scpl_ds-$extra.stamp" 2>/dev/null) == "$(fingerprint)" ]] || return 1
    done
}

# What decides the contents of the environment, in one line.
fingerprint() {
    printf '%s %s' "$ROOT" "$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum)"
}

install() (
    set -e
    extras=$1
    cd "$ROOT"
    make_venv
    index=$(cpu_index)
    echo "Installing scpl-ds[$extras] into $VENV (minutes, once)"
    pip=("$VENV/bin/python" -m pip install --disable-pip-version-check -c constraints.txt)
    # First and with its progress: it and what it brings are the largest.
    if [[ -n $index ]]; then
        echo "No GPU found: taking torch's CPU build from $index. For GPUs elsewhere," \
            "stop this and name pip's index: PIP_INDEX_URL=https://pypi.org/simple"
        "${pip[@]}" --extra-index-url "$index" torch
    else
        "${pip[@]}" torch
    fi
    # compat: by a path. By a finder, as is the default, a clone named scpl_ds would be found in its place
    # by a Python that runs in the folder above it.
    "${pip[@]}" --quiet --config-settings editable_mode=compat -e ".[$extras]"
    for extra in ${extras//,/ }; do
        fingerprint >"$VENV/scpl_ds-$extra.stamp"
    done
)

# cpu_index: where torch's CPU build is, if this machine has no GPU and pip was told of no place to
# take packages from; nothing otherwise. PyPI's torch for Linux brings CUDA packages of gigabytes.
# A machine with SLURM may install for others that have GPUs, so there pip is left alone; so it is
# where that index cannot be reached.
cpu_index() {
    local pip_config
    if [[ $(uname -s) != Linux ]] || may_have_gpu || has_slurm; then
        return 0
    fi
    # Files and PIP_* variables alike.
    pip_config=$("$VENV/bin/python" -m pip config list 2>/dev/null) || return 0
    if grep -Eq '[.](index-url|extra-index-url|find-links|no-index)=' <<<"$pip_config"; then
        return 0
    fi
    if "$VENV/bin/python" -c 'import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10).close()' "$TORCH_CPU_INDEX" 2>/dev/null; then
        echo "$TORCH_CPU_INDEX"
    fi
}

may_have_gpu() {
    command -v nvidia-smi >/dev/null || [[ -e /dev/nvidia0 || -e /dev/kfd ]]
}

has_slurm() {
    command -v sbatch >/dev/null
}

# make_venv: an environment with pip in it. One that is there is kept, whoever made it (uv's have no
# pip, so that is added); only our own is made anew when it is broken.
make_venv() {
    local python
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
        "$VENV/bin/python" -m ensurepip >/dev/null 2>&1; then
        if [[ -e $VENV/$OURS ]]; then
            "$VENV/bin/python" -m venv --without-pip "$VENV" # bin/activate after a move
        fi
        return
    fi
    if [[ -n $(ls -A "$VENV" 2>/dev/null) && ! -e $VENV/$OURS ]]; then
        echo "$VENV has no working Python with pip, and was not made here, so it is left alone." \
            "Repair it, move it away, or point SCPL_DS_VENV at an environment that has scpl_ds." >&2
        return 2
    fi
    python=$(find_python)
    if [[ -e $VENV/$OURS ]]; then
        rm -rf "$VENV"
    fi
    mkdir -p "$VENV"
    touch "$VENV/$OURS" # first, so that what was interrupted is known for ours
    "$python" -m venv "$VENV"
}

find_python() {
    local name names=(python3 python3.13 python3.12 python3.11 python)
    if [[ -n ${PYTHON:-} ]]; then
        names=("$PYTHON")
    fi
    for name in "${names[@]}"; do
        # ensurepip too: Debian has it, and so a venv that works, in a package of its own.
        if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "No Python >= 3.11 with the venv and ensurepip modules found (tried: ${names[*]}). Install" \
        "one (on Debian and Ubuntu also python3-venv), or name it: PYTHON=/path/to/python3.12" >&2
    return 2
}

# A port of this machine that nobody listens on, so that several runs do not meet.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

count_gpus() {
    if may_have_gpu; then
        python -c 'import torch; print(torch.cuda.device_count())'
    else
        echo 0 # without importing torch, which takes seconds
    fi
}

# run_deepspeed RANKS ARGUMENTS...: `scpl-ds ARGUMENTS` on RANKS ranks of this machine. The launcher
# numbers the GPUs anew for every rank and forgets CUDA_VISIBLE_DEVICES, so that is put back: a rank
# takes the visible GPU with its local number, and more ranks than GPUs share them.
run_deepspeed() {
    local ranks=$1 visible=${CUDA_VISIBLE_DEVICES-unset}
    shift
    local program=(python -u -m scpl_ds)
    if [[ $visible != unset ]]; then
        program=(env CUDA_VISIBLE_DEVICES="$visible" "${program[@]}")
        unset CUDA_VISIBLE_DEVICES
    fi
    # As a module: the `deepspeed` script names its Python by path, which ends at a space and is
    # wrong after a move. No hostfile: DeepSpeed would take /job/hostfile where there is one.
    exec python -m deepspeed.launcher.runner --hostfile /dev/null --num_gpus "$ranks" --quiet \
        --master_port "${MASTER_PORT:-$(free_port)}" --no_local_rank --no_python "${program[@]}" "$@"
}
