#!/usr/bin/env bash
# IWSLT'14 German-English as in the paper: 160,239 sentence pairs of TED talks, a Transformer of 39M parameters, on a GPU.
#
#     bash examples/iwslt14_de_en/run.sh RUN [OPTION OF fairseq-train …]
#     bash examples/iwslt14_de_en/run.sh runs/a --attention-mapping multimax --seed 1
#
# trains into the folder RUN, or goes on where it was stopped, and translates the test set with the checkpoint of best BLEU
# on validation, and with the average of the last epochs: RUN/run.json has detokenised SacreBLEU, without regard to case as
# the text is lower-case, and all settings. DATA=FOLDER names the data (default: data/iwslt14_de_en), which are prepared
# if they are not there; SCORE=no stops after training.

set -euo pipefail
# shellcheck source=examples/train.sh
source "$(dirname "$0")/../train.sh"
data=${DATA:-data/iwslt14_de_en}

train=(
    "$data/data-bin" --user-dir "$root/multimax_fairseq" --save-dir "$run"
    --arch multimax_transformer_iwslt_de_en # 6 + 6 layers of width 512, FFN 1024, 4 heads
    --share-decoder-input-output-embed --dropout 0.3
    --task translation
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 1e-4
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000
    --max-tokens 4096   # on N GPUs: --distributed-world-size N --max-tokens 4096/N
    --max-update 50000  # about 45 epochs; fairseq's recipe, which this is, does not say when to stop
    --eval-bleu --eval-bleu-args '{"beam": 5, "max_len_a": 1.2, "max_len_b": 10}'
    --eval-bleu-detok moses --eval-bleu-remove-bpe
    --best-checkpoint-metric bleu --maximize-best-checkpoint-metric
    --update-epoch-batch-itr True # a run that was stopped goes on with the batches that it would have had
    --keep-last-epochs 5 --log-format simple --log-interval 100 --log-file "$run/train.log"
    "$@"
)
train_on_data_of prepare_iwslt14.sh

score() { # CHECKPOINT NAME, with beam 5
    bash "$root/scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run/$1" --user-dir "$user_dir" \
        --reference "$data/raw/test.en" --moses en --out "$run/$2"
}
score checkpoint_best.pt best
if compgen -G "$run/checkpoint[0-9]*.pt" >/dev/null; then # not after less than an epoch
    python "$root/scripts/average_checkpoints.py" --last 5 "$run" --output "$run/average.pt"
    score average.pt average
fi
python "$root/scripts/record_run.py" "$run" --experiment iwslt14_de_en --command "$(printf '%q ' "$0" "$run" "$@")"
