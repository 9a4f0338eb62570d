#!/usr/bin/env bash
# The Brown corpus, a million words: a language model of 2.2M parameters on a CPU.
#
#     examples/brown_lm/run.sh --mapping multimax --output-mapping multimax --seed 1 --from FOLDER
#
# FOLDER has train.tokens, valid.tokens and test.tokens, plain or .gz: see scripts/prepare_text_lm.sh. Perplexity of the
# checkpoint that is best on validation, each token predicted from at least 128 before it.

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=examples/experiment.sh
source "$here/../experiment.sh"

experiment=brown_lm
prepare_script=prepare_text_lm.sh
source_option=--from
prepare_options=(--min-count 5) # 14,112 types
arch=transformer_lm
model=(
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --decoder-normalize-before
    --share-decoder-input-output-embed --dropout 0.1
)

training=(
    --task language_modeling --criterion chunked_cross_entropy # in two thirds of the time of cross_entropy
    --tokens-per-sample 256 --sample-break-mode none
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01
    --lr 6e-3 --lr-scheduler cosine --warmup-updates 200
    --num-workers 0 --log-interval 50
)
max_tokens=1024
length=(--max-update 5000)

smoke_model=("${tiny_lm[@]}")
smoke_length=(--max-update 40)
smoke_training=(--lr-scheduler inverse_sqrt --warmup-updates 20)

prepare_smoke() {
    "$PYTHON" "$scripts/make_smoke_data.py" wikitext103 "$1.zip"
    mkdir "$1"
    "$PYTHON" "$scripts/unpack.py" "$1.zip" "$1" wiki.{train,valid,test}.tokens
    bash "$scripts/$prepare_script" --out "$data" --from "$1"
}

evaluate() {
    perplexity valid 128 --tokens-per-sample 256 --max-tokens 2048
    perplexity test 128 --tokens-per-sample 256 --max-tokens 2048
}

run_experiment "$@"
