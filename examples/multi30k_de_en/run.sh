#!/usr/bin/env bash
# Multi30k German-English: 29,000 image descriptions, a Transformer of 2.1M parameters, a quarter of an hour of a CPU core.
#
#     bash examples/multi30k_de_en/run.sh RUN [OPTION OF fairseq-train …]
#     bash examples/multi30k_de_en/run.sh runs/a --attention-mapping multimax --seed 1
#
# trains into the folder RUN, or goes on where it was stopped, and translates test_2016_flickr with the checkpoint of
# lowest loss on validation: RUN/run.json has detokenised SacreBLEU and all settings. DATA=FOLDER names the data (default:
# data/multi30k_de_en), which are prepared if they are not there; SCORE=no stops after training.

set -euo pipefail
# shellcheck source=examples/train.sh
source "$(dirname "$0")/../train.sh"
data=${DATA:-data/multi30k_de_en}

train=(
    "$data/data-bin" --user-dir "$root/multimax_fairseq" --save-dir "$run"
    # 4 + 4 layers of width 128: 0.8M of the 2.1M parameters are the embeddings of the pieces
    --arch multimax_transformer --share-all-embeddings --dropout 0.2
    --encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    --task translation
    --criterion chunked_cross_entropy --label-smoothing 0.1 # in nine tenths of the time of label_smoothed_cross_entropy
    --optimizer adam --adam-betas '(0.9, 0.98)'
    --lr 3e-3 --lr-scheduler cosine --warmup-updates 800 # sparsemax: --lr 1e-3; 1.5- and α-entmax: --lr 2e-3
    --max-tokens 1024 --max-update 4500 # small batches: many updates
    --update-epoch-batch-itr True       # a run that was stopped goes on with the batches that it would have had
    --no-epoch-checkpoints --num-workers 0 --log-format simple --log-interval 50 --log-file "$run/train.log"
    "$@"
)
train_on_data_of prepare_multi30k.sh

# beam 5
bash "$root/scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run/checkpoint_best.pt" \
    --user-dir "$user_dir" --reference "$data/raw/test.en" --sentencepiece "$data/sentencepiece.bpe.model" \
    --out "$run/best"
python "$root/scripts/record_run.py" "$run" --experiment multi30k_de_en --command "$(printf '%q ' "$0" "$run" "$@")"
