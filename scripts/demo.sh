#!/usr/bin/env bash
# From nothing to a BLEU score: installs, makes a German-English corpus from a grammar, trains a small Transformer with
# MultiMax in every attention module, translates and scores the test set, and reports what the attention learned. About
# 5 minutes on two cores.
#
#     bash scripts/demo.sh [OPTION OF fairseq-train …]      for example: --attention-mapping sparsemax
#
# OUT=FOLDER gets data, checkpoints, translations and the report (default: demo). Started again, it goes on. Without an
# active virtual or conda environment it makes .venv.

set -euo pipefail
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || { sed -n '2,/^$/s/^# \?//p' "$0"; exit; }
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
root=$(dirname "$scripts")
# shellcheck source=scripts/environment.sh
source "$scripts/environment.sh"
out=${OUT:-demo}
data=$out/data run=$out/run$(tr -cs '[:alnum:].\n' - <<<"$*")
step() { printf '\n== %s: %s\n' "$1" "$2"; }

step "Installation" "fairseq, torch and this plugin"
use_environment "$root"
export PYTHONWARNINGS=ignore # fairseq and torch warn about each other

train=(
    "$data/data-bin" --user-dir "$root/multimax_fairseq" --save-dir "$run"
    --arch multimax_transformer --share-decoder-input-output-embed --dropout 0.1
    --encoder-layers 2 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    --task translation
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 200
    --max-tokens 4096 --max-epoch 8 --required-batch-size-multiple 1 --update-epoch-batch-itr True
    --no-epoch-checkpoints --num-workers 0 --log-format tqdm --log-file "$run/train.log"
    "$@"
)
mkdir -p "$(dirname "$out")"
user_dir=$(python "$scripts/begin_run.py" "$run" "${train[@]}" 2>"$out.log") || { tail -n 1 "$out.log" >&2; exit 1; }
rm "$out.log"

step "Corpus" "sentence pairs from a grammar"
bash "$scripts/prepare_demo.sh" --out "$data"

step "Training" "2 + 2 layers of width 128"
# the memory that a step has freed is kept for the next
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1}
[[ -f $run/trained ]] || fairseq-train "${train[@]}" | # a line an epoch; the progress bar goes to the terminal by itself
    awk -F ' [|] ' '$3 == "valid" { for (i = 5; i <= NF; i++) if ($i ~ /^ppl/) print "  " $4 ": validation " $i; fflush() }'
touch "$run/trained"

step "Translation" "beam search on 500 sentences that training has not seen"
bash "$scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run/checkpoint_best.pt" \
    --user-dir "$user_dir" --reference "$data/raw/test.en" --out "$run/test"
paste "$data/raw/test.de" "$data/raw/test.en" "$run/test.hypotheses" | # awk reads all of it: after head, paste would fail
    awk -F '\t' 'NR <= 4 { printf "\n  German      %s\n  reference   %s\n  translation %s\n", $1, $2, $3 }'

step "Attention" "a report of what it learned"
multimax-analyze "$run/checkpoint_best.pt" --data "$data/data-bin" --split test --max-sentences 100 \
    --alignments "$data/text/test.align" --out "$run/report" --force
printf '\nAll of it is in %s\n' "$out"
