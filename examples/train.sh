# Sourced by */run.sh, never run: sets root and run, takes RUN off the options, and shows the head of run.sh without it.
#
#     train_on_data_of SCRIPT [OPTION …]    # which prepares $data if they are not there
#
# trains into $run with the options "${train[@]}", unless that has been done, and sets user_dir; ends the run here if it
# has been recorded, or with SCORE=no.

# shellcheck shell=bash disable=SC2034,SC2154

[[ ${1:--} != -* ]] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 1; }
root=$(cd "$(dirname "$0")/../.." >/dev/null && pwd)
run=$1
shift

train_on_data_of() {
    # Wrong options, another run in RUN: said before any work. A checkpoint that a kill has cut: replaced.
    user_dir=$(python "$root/scripts/begin_run.py" "$run" "${train[@]}")
    [[ ! -f $run/run.json ]] || { echo "already done: $run/run.json"; exit; }
    [[ -d $data/data-bin ]] || bash "$root/scripts/$1" --out "$data" "${@:2}"

    # On a CPU a step is a third faster if the C library keeps the memory that the last one has freed.
    export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1}
    [[ -f $run/trained ]] || ${LAUNCH:-fairseq-train} "${train[@]}"
    touch "$run/trained"
    [[ ${SCORE:-yes} == yes ]] || exit 0
}
