#!/usr/bin/env bash
# Runs a list of experiments one after another, and prints the table of their results.
#
#     examples/run_list.sh multi30k_de_en examples/mappings.txt --updates 2000
#     examples/run_list.sh iwslt14_de_en examples/ablation.txt --seeds 1,2,3
#
#   EXPERIMENT LIST   a folder of examples/, and a file with options of its run.sh, one line per run
#   --seeds LIST      comma-separated: each line runs with each of them (default: 1)
#   --runs DIR        where the runs go (default: runs/EXPERIMENT)
#   --dry-run         print the commands, and do nothing
#   OPTION ...        any other option is passed to each run.sh
#   --help            show this text
#
# You can stop it at any time; started again, it resumes the run that was stopped. If a run fails, the next ones still
# run, and the exit status is 1.

set -euo pipefail

examples=$(cd "$(dirname "$0")" >/dev/null && pwd)
scripts=$(dirname "$examples")/scripts
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

runs=
dry_run=
seeds=1 # a list
extra=() # for run.sh

[[ ${1:-} != --help && ${1:-} != -h ]] || { show_help "$0"; exit; }
[[ $# -ge 2 ]] || die "the experiment and the list of runs are required; see --help"
experiment=$1
list=$2
shift 2
[[ -f $examples/$experiment/run.sh ]] || die "there is no experiment '$experiment'; choose a folder of $examples"
need_file "$list"
parse_options "
--seeds    seeds    text
--runs     runs     path
--dry-run  dry_run  =--dry-run
*
" "$@"
for option in ${extra[@]+"${extra[@]}"}; do
    [[ $option != -- ]] || break
    [[ ! $option =~ ^--(seed|out)(=.*)?$ ]] || die "${option%%=*} is for a single run: use --seeds or --runs here"
done
IFS=, read -r -a seeds <<<"$seeds"
for seed in "${seeds[@]}"; do need_number --seeds "$seed" 1; done

trap 'exit 130' INT # otherwise Ctrl-C would only skip to the next run
failed=
while read -r -a options <&3 || ((${#options[@]})); do
    [[ ${#options[@]} -gt 0 && ${options[0]} != \#* ]] || continue
    for seed in "${seeds[@]}"; do
        [[ -n $dry_run ]] || printf '\n== %s %s --seed %s\n' "$experiment" "${options[*]}" "$seed"
        bash "$examples/$experiment/run.sh" "${options[@]}" --seed "$seed" ${runs:+--runs "$runs"} ${dry_run:+"$dry_run"} \
            ${extra[@]+"${extra[@]}"} || failed+=$'\n'"  ${options[*]} --seed $seed"
    done
done 3<"$list"
if [[ -z $dry_run ]]; then
    echo
    need_python
    "$PYTHON" "$scripts/results_table.py" "${runs:-runs/$experiment}" || failed+=$'\n  the table'
fi
[[ -z $failed ]] || die "these failed:$failed"
