#!/usr/bin/env bash
# WikiText-103 as in the paper: a language model of 156M parameters, 6 layers of width 512, all 267,744 types.
#
#     examples/wikitext103/run.sh --mapping multimax --output-mapping multimax --seed 1
#
# Perplexity of the checkpoint that is best on validation, each token predicted from at least 400 before it, and from
# what its block of 512 has.

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=examples/experiment.sh
source "$here/../experiment.sh"

experiment=wikitext103
prepare_script=prepare_wikitext103.sh
source_option=--archive
arch=transformer_lm # 6 layers of width 512, FFN 2048, 8 heads
model=(--share-decoder-input-output-embed --dropout 0.1)

training=(
    --task language_modeling --tokens-per-sample 512 --sample-break-mode none
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7
    --save-interval-updates 2000 --keep-interval-updates 1
    --log-interval 100
)
# 16 batches of 2,048 tokens an update on one GPU, 4 on four (--processes 4): 32,768 tokens either way.
max_tokens=2048
update_freq=16
length=(--max-update 50000)
precision=fp16

smoke_model=("${tiny_lm[@]}")
smoke_length=(--max-update 40)
smoke_training=(--lr 5e-3 --warmup-updates 20)

prepare_smoke() {
    "$PYTHON" "$scripts/make_smoke_data.py" wikitext103 "$1.zip"
    bash "$scripts/$prepare_script" --out "$data" --archive "$1.zip"
}

evaluate() {
    perplexity test 400 --tokens-per-sample 512 --max-tokens 1024
    perplexity test 0 --tokens-per-sample 512 --max-tokens 1024
}

run_experiment "$@"
