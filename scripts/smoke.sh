#!/usr/bin/env bash
# Does everything work here? Runs all three experiments with tiny models, from made-up archives to a table of results.
# A minute and a half on a CPU core.
#
#     scripts/smoke.sh [--out DIR] [OPTION OF run.sh ...]        for example: scripts/smoke.sh --mapping sparsemax
#
#   --out DIR    data, checkpoints, scores and logs (default: a temporary folder, removed at the end)
#   --help       show this text
#
# The scores mean nothing. Each experiment is the `run.sh --cpu-smoke` of its folder in examples/.

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

out_folder=
extra=() # for run.sh

parse_options "
--out  out_folder  path
*
" "$@"
need_python
need_fairseq
need_module sacremoses # for prepare_iwslt14.sh, which runs later
need_module subword_nmt
if [[ -z $out_folder ]]; then
    out_folder=$(temporary -d)
    trap 'rm -rf "$out_folder"' EXIT
fi
make_folder "$out_folder"

for experiment in multi30k_de_en iwslt14_de_en wikitext103; do
    start=$SECONDS
    log=$out_folder/$experiment.log
    bash "$scripts/../examples/$experiment/run.sh" --cpu-smoke --data "$out_folder/data/$experiment" \
        --runs "$out_folder/runs/$experiment" ${extra[@]+"${extra[@]}"} >"$log" 2>&1 ||
        { tail -n 15 "$log" >&2; die "$experiment failed; its last lines are above"; }
    info "$experiment: $((SECONDS - start)) s"
done
echo
"$PYTHON" "$scripts/results_table.py" "$out_folder/runs"
