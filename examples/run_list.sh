#!/usr/bin/env bash
# Runs a list one after another, each line with each seed, and prints the table of their results.
#
#     bash examples/run_list.sh EXPERIMENT LIST RUNS "SEED …" [OPTION OF fairseq-train …]
#     bash examples/run_list.sh iwslt14_de_en examples/ablation.txt runs/ablation "1 2 3" --max-update 20000
#
# A line of LIST has options of fairseq-train, between blanks; quotes are letters: --adam-betas (0.9,0.95). Each run goes
# to a folder in RUNS that is named after them. Stopped and started again, it goes on. If a run fails, the next ones still
# run, and the exit status is 1. A job of Slurm's array does its own run of them alone (see slurm.sh).

set -euo pipefail
[[ $# -ge 4 && -f $2 ]] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 1; }
examples=$(dirname "$0") experiment=$1 list=$2 runs=$3 seeds=$4 failed=0 number=0 job=${SLURM_ARRAY_TASK_ID:-}
shift 4
trap 'exit 130' INT # otherwise Ctrl-C would only skip to the next run
while read -r line <&3 || [[ $line ]]; do
    [[ $line && $line != \#* ]] || continue
    read -r -a options <<<"$line"
    for seed in $seeds; do
        run=$runs/$(tr -cs '[:alnum:].\n' - <<<"${line//--/}")-seed$seed
        [[ ${job:-$number} != "$number" ]] ||
            bash "$examples/$experiment/run.sh" "$run" "${options[@]}" --seed "$seed" "$@" || failed=1
        number=$((number + 1))
    done
done 3<"$list"
[[ $job ]] || python "$examples/../scripts/results_table.py" "$runs"
exit "$failed"
