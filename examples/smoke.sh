#!/usr/bin/env bash
# Does everything work here? All experiments with tiny models, from made-up archives to a table of results: minutes of a
# CPU core. The scores mean nothing.
#
#     bash examples/smoke.sh FOLDER [OPTION OF fairseq-train …]      for example: --attention-mapping sparsemax --lr 1e-3
#
# FOLDER gets data and runs; started again, it goes on.

set -euo pipefail
[[ ${1:--} != -* ]] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 1; }
examples=$(cd "$(dirname "$0")" >/dev/null && pwd)
scripts=$(dirname "$examples")/scripts out=$1
shift

[[ -f $out/made-up/wikitext-103-v1.zip ]] || bash "$scripts/make_smoke_data.sh" "$out/made-up" 500
bash "$scripts/prepare_multi30k.sh" --out "$out/data/multi30k_de_en" --from "$out/made-up/multi30k" --vocab-size 500
bash "$scripts/prepare_iwslt14.sh" --out "$out/data/iwslt14_de_en" --archive "$out/made-up/de-en.tgz" --merges 300
bash "$scripts/prepare_wikitext103.sh" --out "$out/data/wikitext103" --archive "$out/made-up/wikitext-103-v1.zip"

decoder=(--decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2)
encoder=(--encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2)
short=(--lr-scheduler inverse_sqrt --lr 5e-3 --warmup-updates 20 --max-tokens 1024 --num-workers 0 --cpu)

run() { # EXPERIMENT OPTION …
    DATA=$out/data/$1 bash "$examples/$1/run.sh" "$out/runs/$1" "${@:2}"
}
run multi30k_de_en "${encoder[@]}" "${decoder[@]}" "${short[@]}" --max-update 40 "$@"
run iwslt14_de_en "${encoder[@]}" "${decoder[@]}" "${short[@]}" --max-epoch 2 --max-valid-steps 2 "$@"
run wikitext103 "${decoder[@]}" --decoder-input-dim 32 --decoder-output-dim 32 "${short[@]}" --update-freq 1 --max-update 40 "$@"
python "$scripts/results_table.py" "$out/runs"
