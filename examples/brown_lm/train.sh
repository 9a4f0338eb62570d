#!/usr/bin/env bash
# A small language model on a text of a million words: 2 layers of width 128.
#
#     examples/brown_lm/train.sh --data data/brown --mapping multimax --output-mapping multimax --out runs/brown
#
# --data is made by scripts/prepare_text_lm.sh. Perplexity of the checkpoint that is best on validation, in blocks of 256
# tokens, each token predicted from at least 128 before it (except at the very start).

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=examples/experiment.sh
source "$here/../experiment.sh"

experiment=brown_lm
prepare_script=prepare_text_lm.sh
prepare_options=(--min-count 5)
arch=transformer_lm
model=(
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --decoder-normalize-before
    --share-decoder-input-output-embed --dropout 0.1
)
training=(
    --task language_modeling --tokens-per-sample 256 --sample-break-mode none
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01
    --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 400 --num-workers 0 --log-interval 50
)
max_tokens=2048
length=(--max-update 1500) # 518 of them are an epoch of the Brown corpus

smoke_model=("${model[@]}")
smoke_length=(--max-update 40)

prepare_smoke() {
    "$PYTHON" "$scripts/make_smoke_data.py" wikitext103 "$1.zip"
    bash "$scripts/prepare_wikitext103.sh" --out "$data" --archive "$1.zip"
}

evaluate() {
    perplexity valid 128 --tokens-per-sample 256 --max-tokens 2048
    perplexity test 128 --tokens-per-sample 256 --max-tokens 2048
}

run_experiment "$@"
