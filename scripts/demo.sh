#!/usr/bin/env bash
# From nothing to a BLEU score: installs, makes a German-English corpus, trains a small Transformer with MultiMax
# in every attention module, translates and scores the test set, and reports what the attention learned. About
# 4 minutes on two cores.
#
#     scripts/demo.sh                      sentences from a grammar, no download
#     scripts/demo.sh --data multi30k      image descriptions (downloads 1.3 MB; a quarter of an hour of training)
#
#   --data NAME       grammar or multi30k (default: grammar)
#   --from DIR        take Multi30k's gzipped files from DIR and download nothing
#   --mapping NAME    of attention: multimax, softmax, sparsemax, entmax15, entmax, evsoftmax (default: multimax)
#   --epochs N        for the grammar (default: 8); multi30k's recipe sets its own
#   --seed N          (default: 1)
#   --out DIR         data, checkpoints and translations (default: demo, in this folder)
#   --help            show this text
#
# A second run continues the first. Without an active virtual or conda environment it makes .venv.

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
root=$(dirname "$scripts")
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
# shellcheck source=scripts/environment.sh
source "$scripts/environment.sh"

corpus=grammar
folder= # --from
mapping=multimax
epochs=
seed=1
output=demo # --out

readonly OPTIONS="
--data     corpus   one of grammar multi30k
--from     folder   text
--mapping  mapping  one of multimax softmax sparsemax entmax15 entmax evsoftmax
--epochs   epochs   1
--seed     seed     1
--out      output   path
"

check_options() {
    [[ -z $folder || $corpus == multi30k ]] || die "--from goes with --data multi30k"
    [[ -z $epochs || $corpus == grammar ]] || die "--epochs goes with --data grammar: the recipe of multi30k has its own length"
    epochs=${epochs:-8}
}

# epochs_of_log: reduce fairseq-train's log to a line per epoch. (Its progress bar goes to the terminal by itself.)
epochs_of_log() {
    awk -F ' [|] ' '$3 == "valid" {
        for (i = 5; i <= NF; i++) if ($i ~ /^ppl/) print "  " $4 ": validation " $i
        fflush()
    }'
}

# show_translations SOURCE REFERENCE HYPOTHESES: the first few of each, together.
show_translations() {
    paste "$1" "$2" "$3" |
        awk -F '\t' 'NR <= 4 { printf "\n  German      %s\n  reference   %s\n  translation %s\n", $1, $2, $3 }'
}

# report_attention DATA RUN [OPTION ...]: what the attention does on a hundred sentences of the test set.
report_attention() {
    local data=$1 run=$2
    shift 2
    step "Attention" "a report of what it learned"
    multimax-analyze "$run/checkpoint_best.pt" --data "$data/data-bin" --split test --max-sentences 100 \
        --out "$run-report" --force "$@"
}

grammar_demo() {
    local data=$output/grammar run=$output/grammar-$mapping-$seed
    step "Corpus" "sentence pairs from a grammar"
    bash "$scripts/prepare_demo.sh" --out "$data"

    step "Training" "2+2 layers of width 128, $mapping in attention, $epochs epochs"
    "$PYTHON" "$scripts/resume_checkpoint.py" "$run"
    keep_memory fairseq-train "$data/data-bin" --user-dir "$root/multimax_fairseq" \
        --arch multimax_transformer --attention-mapping "$mapping" \
        --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4 \
        --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4 \
        --share-decoder-input-output-embed --dropout 0.1 \
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
        --optimizer adam --adam-betas '(0.9, 0.98)' --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 200 \
        --max-tokens 4096 --required-batch-size-multiple 1 --update-epoch-batch-itr True \
        --max-epoch "$epochs" --seed "$seed" --num-workers 0 \
        --save-dir "$run" --no-epoch-checkpoints --log-format tqdm --log-file "$run.log" | epochs_of_log

    step "Translation" "beam search on 500 sentences that training has not seen"
    bash "$scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run/checkpoint_best.pt" \
        --reference "$data/raw/test.en" --out "$run/test"
    show_translations "$data/raw/test.de" "$data/raw/test.en" "$run/test.hypotheses"
    report_attention "$data" "$run" --alignments "$data/text/test.align"
}

multi30k_demo() {
    local data=$output/multi30k run=$output/multi30k-$mapping-$seed
    step "Corpus, training and translation" "Multi30k, 4+4 layers of width 128, $mapping in attention"
    bash "$root/examples/multi30k_de_en/run.sh" --data "$data" ${folder:+--from "$folder"} --mapping "$mapping" \
        --seed "$seed" --out "$run" -- --log-format tqdm | epochs_of_log
    cat "$run/best.bleu"
    show_translations "$data/raw/test.de" "$data/raw/test.en" "$run/best.hypotheses"
    report_attention "$data" "$run"
}

step() { printf '\n== %s: %s\n' "$1" "$2"; }

main() {
    parse_options "$OPTIONS" "$@"
    check_options
    export PYTHONWARNINGS=ignore # fairseq and torch warn about each other
    step "Installation" "fairseq, torch and this plugin"
    use_environment "$root"
    make_folder "$output"
    "${corpus}_demo"
    printf '\nAll of it is in %s\n' "$output"
}

main "$@"
