#!/usr/bin/env bash
# The Brown corpus, a million words: a language model of 2.2M parameters, a quarter of an hour of a CPU core.
#
#     bash examples/brown_lm/run.sh RUN [OPTION OF fairseq-train …]
#     bash examples/brown_lm/run.sh runs/a --output-mapping multimax --seed 1
#
# trains into the folder RUN, or goes on where it was stopped: RUN/run.json has the perplexity of the checkpoint that is
# best on validation, and all settings. DATA=FOLDER names the data (default: data/brown_lm): prepare them first, as there
# is nothing to download: bash scripts/prepare_text_lm.sh --from FOLDER --min-count 5 --out data/brown_lm
# SCORE=no stops after training.

set -euo pipefail
# shellcheck source=examples/train.sh
source "$(dirname "$0")/../train.sh"
data=${DATA:-data/brown_lm}

train=(
    "$data/data-bin" --user-dir "$root/multimax_fairseq" --save-dir "$run"
    --arch multimax_transformer_lm --share-decoder-input-output-embed --dropout 0.1 --decoder-normalize-before
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4
    --task language_modeling --tokens-per-sample 256 --sample-break-mode none
    --criterion chunked_cross_entropy # in two thirds of the time of cross_entropy
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01
    --lr 6e-3 --lr-scheduler cosine --warmup-updates 200
    --max-tokens 1024 --max-update 5000
    --update-epoch-batch-itr True # a run that was stopped goes on with the batches that it would have had
    --no-epoch-checkpoints --num-workers 0 --log-format simple --log-interval 50 --log-file "$run/train.log"
    "$@"
)
train_on_data_of prepare_text_lm.sh --min-count 5 # 14,112 types

# Each token is predicted from at least 128 before it.
for split in valid test; do
    fairseq-eval-lm "$data/data-bin" --user-dir "$user_dir" --path "$run/checkpoint_best.pt" --gen-subset "$split" \
        --context-window 128 --tokens-per-sample 256 --max-tokens 2048 --sample-break-mode none --num-workers 0 \
        2>&1 | tee "$run/$split.context-128.eval"
done
python "$root/scripts/record_run.py" "$run" --experiment brown_lm --command "$(printf '%q ' "$0" "$run" "$@")"
