# Shared by demo.sh and test.sh: sourced, never run.
#
#     use_environment "$root" [EXTRA]    # the project in $root, with the dependencies of EXTRA (of setup.py)
#
# installs into the active virtual or conda environment, or makes $root/.venv.

# shellcheck shell=bash

die() { printf 'ERROR: %s\n' "$*" >&2; exit 1; }

# suitable COMMAND: can fairseq be installed for this Python?
suitable() {
    command -v "$1" >/dev/null &&
        "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

use_environment() {
    local root=$1 extra=${2:-} target python wanted stamp
    target=.${extra:+[$extra]}
    if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
        if [[ ! -f $root/.venv/bin/activate ]]; then
            for python in python3 python python3.12 python3.11 python3.10; do ! suitable "$python" || break; done
            suitable "$python" || die "this needs Python 3.10, 3.11 or 3.12 with the venv module: install one," \
                "or activate an environment that has it"
            echo "making the virtual environment .venv with $("$python" --version)"
            "$python" -m venv "$root/.venv"
        fi
        # shellcheck source=/dev/null
        source "$root/.venv/bin/activate"
    fi
    suitable python || die "the active environment has $(python --version), and this needs 3.10, 3.11 or 3.12:" \
        "deactivate it (then .venv is made), or activate another"

    # pip takes seconds to find nothing to do, so the environment keeps a note of what has been installed.
    wanted=$(cat "$root/setup.py" "$root/requirements.txt"; echo "$root $target")
    stamp=$(python -c 'import sys; print(sys.prefix)')/.multimax_fairseq${extra:+-$extra}
    [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]] || return 0
    echo "installing (about a minute, and more where torch has to be downloaded)"
    if python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
        echo "replacing pip by one older than 24.1: newer ones reject what fairseq 0.12.2 depends on"
        python -m pip install --quiet 'pip<24.1'
    fi
    (cd "$root" && python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e "$target") ||
        die "the installation failed; its last lines are above"
    printf '%s\n' "$wanted" >"$stamp"
}
