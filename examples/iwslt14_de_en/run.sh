#!/usr/bin/env bash
# IWSLT'14 German-English as in the paper: 160,239 sentence pairs of TED talks, a Transformer of 39M parameters.
#
#     examples/iwslt14_de_en/run.sh --mapping multimax --seed 1
#
# Scores the checkpoint that is best on validation (by BLEU), and the average of the last epochs: beam 5, detokenised
# SacreBLEU without regard to case, as the text is lower-case.

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=examples/experiment.sh
source "$here/../experiment.sh"

experiment=iwslt14_de_en
prepare_script=prepare_iwslt14.sh
source_option=--archive
arch=transformer_iwslt_de_en # 6 + 6 layers of width 512, FFN 1024, 4 heads
model=(--share-decoder-input-output-embed --dropout 0.3)

# fairseq's recipe, which does not say when to stop: 50,000 updates are about 45 epochs.
training=(
    --task translation
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}'
    --eval-bleu-detok moses --eval-bleu-remove-bpe
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
    --log-interval 100
)
max_tokens=4096
length=(--max-update 50000)
average=5

smoke_model=("${tiny_transformer[@]}" --share-decoder-input-output-embed --dropout 0.3)
smoke_length=(--max-epoch 2)
smoke_training=(--lr 5e-3 --warmup-updates 40 --max-valid-steps 2)

prepare_smoke() {
    "$PYTHON" "$scripts/make_smoke_data.py" iwslt14 "$1.tgz" --sentences 500
    bash "$scripts/$prepare_script" --out "$data" --archive "$1.tgz" --merges 300
}

evaluate() { score_best_and_average "$data/raw/test.en" --moses en; }

run_experiment "$@"
