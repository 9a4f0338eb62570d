#!/usr/bin/env bash
# A list as an array job of Slurm, one GPU a run. Prepare the data first, then, with lines × seeds numbers:
#
#     sbatch --array 0-14 examples/slurm.sh iwslt14_de_en examples/ablation.txt runs/ablation "1 2 3"
#
# Lines are as in run_list.sh. A job that runs out of time goes on when it is submitted again.
#SBATCH --gres=gpu:1 --cpus-per-task=4 --mem=32G --time=12:00:00 --output=slurm-%A_%a.out

set -euo pipefail
experiment=$1 list=$2 runs=$3
read -r -a seeds <<<"$4"
mapfile -t lines < <(grep -v '^ *\(#\|$\)' "$list")
line=${lines[SLURM_ARRAY_TASK_ID / ${#seeds[@]}]} seed=${seeds[SLURM_ARRAY_TASK_ID % ${#seeds[@]}]}
read -r -a options <<<"$line"
# sbatch runs a copy of this file; the examples are where it was called from
exec bash "examples/$experiment/run.sh" "$runs/$(tr -cs '[:alnum:].\n' - <<<"${line//--/}")-seed$seed" \
    "${options[@]}" --seed "$seed"
