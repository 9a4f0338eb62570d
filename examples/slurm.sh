#!/usr/bin/env bash
# A list as an array job of Slurm, one GPU a run. Prepare the data first, then, with lines × seeds numbers:
#
#     sbatch --array 0-14 examples/slurm.sh iwslt14_de_en examples/ablation.txt runs/ablation "1 2 3"
#
# Lines and options are as in run_list.sh. A job that runs out of time goes on when it is submitted again.
#SBATCH --gres=gpu:1 --cpus-per-task=4 --mem=32G --time=12:00:00 --output=slurm-%A_%a.out

# sbatch runs a copy of this file; the examples are where it was called from
exec bash examples/run_list.sh "$@"
