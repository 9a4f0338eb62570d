#!/usr/bin/env bash
# WikiText-103 as in the paper: a language model of 156M parameters, 6 layers of width 512, all 267,744 types, on a GPU.
#
#     bash examples/wikitext103/run.sh RUN [OPTION OF fairseq-train …]
#     bash examples/wikitext103/run.sh runs/a --output-mapping multimax --seed 1 --fp16
#
# trains into the folder RUN, or goes on where it was stopped: RUN/run.json has the perplexity on test of the checkpoint
# that is best on validation, and all settings. DATA=FOLDER names the data (default: data/wikitext103), which are prepared
# if they are not there; SCORE=no stops after training.

set -euo pipefail
# shellcheck source=examples/train.sh
source "$(dirname "$0")/../train.sh"
data=${DATA:-data/wikitext103}

train=(
    "$data/data-bin" --user-dir "$root/multimax_fairseq" --save-dir "$run"
    --arch multimax_transformer_lm # 6 layers of width 512, FFN 2048, 8 heads
    --share-decoder-input-output-embed --dropout 0.1
    --task language_modeling --tokens-per-sample 512 --sample-break-mode none
    --criterion cross_entropy
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-7
    --max-tokens 2048 --update-freq 16 # 32,768 tokens an update; on N GPUs: --distributed-world-size N --update-freq 16/N
    --max-update 50000
    --update-epoch-batch-itr True      # a run that was stopped goes on with the batches that it would have had
    --save-interval-updates 2000 --keep-interval-updates 1 --no-epoch-checkpoints
    --log-format simple --log-interval 100 --log-file "$run/train.log"
    "$@"
)
train_on_data_of prepare_wikitext103.sh

# Each token is predicted from at least 400 before it, and from what its block of 512 has.
for window in 400 0; do
    fairseq-eval-lm "$data/data-bin" --user-dir "$user_dir" --path "$run/checkpoint_best.pt" --gen-subset test \
        --context-window "$window" --tokens-per-sample 512 --max-tokens 1024 --sample-break-mode none \
        2>&1 | tee "$run/test.context-$window.eval"
done
python "$root/scripts/record_run.py" "$run" --experiment wikitext103 --command "$(printf '%q ' "$0" "$run" "$@")"
