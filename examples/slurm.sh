#!/usr/bin/env bash
# Runs a list as Slurm jobs, one GPU each. Prepare the data first, then submit:
#
#     bash examples/iwslt14_de_en/run.sh --only prepare
#     sbatch --array 1-15 examples/slurm.sh iwslt14_de_en examples/ablation.txt 3
#
#   EXPERIMENT LIST SEEDS   each line of LIST that is neither a comment nor blank is run with seeds 1 to SEEDS, so the
#                           array has lines × SEEDS numbers
#
# If a job runs out of time, submit it again with the same command; it resumes from its last checkpoint.

#SBATCH --job-name=multimax
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%A_%a.out

set -euo pipefail

if [[ $# -ne 3 || -z ${SLURM_ARRAY_TASK_ID:-} || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit 1
fi
experiment=$1
list=$2
seeds=$3

line=$(((SLURM_ARRAY_TASK_ID - 1) / seeds + 1))
seed=$(((SLURM_ARRAY_TASK_ID - 1) % seeds + 1))
read -r -a options < <(awk -v line="$line" 'NF && $1 !~ /^#/ && ++number == line' "$list") ||
    { echo "ERROR: $list has no line $line: --array is too long" >&2; exit 1; }

# sbatch runs a copy of this file; the examples are where it was called from
exec bash "examples/$experiment/run.sh" "${options[@]}" --seed "$seed"
