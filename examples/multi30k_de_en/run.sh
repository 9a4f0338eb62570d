#!/usr/bin/env bash
# Multi30k German-English: 29,000 image descriptions, a Transformer of 2.1M parameters, a quarter of an hour of a CPU core.
#
#     examples/multi30k_de_en/run.sh --mapping multimax --seed 1
#
# Scores the checkpoint with the lowest loss on validation on test_2016_flickr: beam 5, detokenised SacreBLEU.

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=examples/experiment.sh
source "$here/../experiment.sh"

experiment=multi30k_de_en
prepare_script=prepare_multi30k.sh
source_option=--from
arch=transformer
# 4 + 4 layers of width 128: 0.8M of the 2.1M parameters are the embeddings of the pieces.
model=(
    --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    --share-all-embeddings --dropout 0.2
)

training=(
    --task translation
    --criterion chunked_cross_entropy --label-smoothing 0.1 # in nine tenths of the time of label_smoothed_cross_entropy
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 3e-3 --lr-scheduler cosine --warmup-updates 800
    --num-workers 0 --log-interval 50
)
# Sparse attention at a high rate ends on a single key, whose probability of 1 has no gradient.
sparsemax=(--lr 1e-3)
entmax=(--lr 2e-3)
max_tokens=1024 # small batches: many updates
length=(--max-update 4500)

smoke_model=("${tiny_transformer[@]}" --share-all-embeddings --dropout 0.3)
smoke_length=(--max-epoch 2)
smoke_training=(--lr-scheduler inverse_sqrt --warmup-updates 40)

prepare_smoke() {
    "$PYTHON" "$scripts/make_smoke_data.py" multi30k "$1" --sentences 500
    bash "$scripts/$prepare_script" --out "$data" --from "$1" --vocab-size 500
}

evaluate() { score_best_and_average "$data/raw/test.en" --sentencepiece "$data/sentencepiece.bpe.model"; }

run_experiment "$@"
