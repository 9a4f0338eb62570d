#!/usr/bin/env bash
# Trains a small Transformer language model on a text of a million words, and prints its perplexities.
#
#     examples/brown_lm/train.sh --data data/brown --mapping multimax --output-mapping multimax --out runs/brown
#
#   --data DIR               made by scripts/prepare_text_lm.sh (default: data/brown)
#   --mapping NAME           of attention: multimax, softmax, sparsemax, entmax15, entmax, evsoftmax
#                            (default: multimax)
#   --output-mapping NAME    of the vocabulary: softmax, multimax, sparsemax, entmax15, entmax (default: softmax)
#   --seed N                 (default: 1)
#   --updates N              (default: 1500; 518 of them are an epoch of the Brown corpus)
#   --out DIR                checkpoints and logs (default: runs/brown-MAPPING-OUTPUT_MAPPING-SEED);
#                            run it again with the same DIR and it goes on from the last checkpoint
#   -- OPTION ...            further options of fairseq-train
#   --help                   show this text

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
root=$here/../..
# shellcheck source=scripts/common.sh
source "$root/scripts/common.sh"

data=data/brown
mapping=multimax
output_mapping=softmax
seed=1
updates=1500
run_dir=
extra=()

parse_options "
--data            data            text
--mapping         mapping         text
--output-mapping  output_mapping  text
--seed            seed            1
--updates         updates         1
--out             run_dir         text
--
" "$@"
run_dir=${run_dir:-runs/brown-$mapping-$output_mapping-$seed}
[[ -d $data/data-bin ]] || die "$data has no data-bin: make it with scripts/prepare_text_lm.sh --out $data --from DIR"
need_tool fairseq-train "activate the environment that holds fairseq"
criterion=cross_entropy
case $output_mapping in sparsemax | entmax15 | entmax) criterion=entmax_loss ;; esac

mkdir -p "$run_dir"
# 2 layers of width 128 with tied embeddings, 256 tokens of context.
keep_memory fairseq-train "$data/data-bin" --user-dir "$root/multimax_fairseq" --task language_modeling \
    --arch multimax_transformer_lm --attention-mapping "$mapping" --output-mapping "$output_mapping" \
    --decoder-layers 2 --decoder-embed-dim 128 --decoder-input-dim 128 --decoder-output-dim 128 \
    --decoder-ffn-embed-dim 512 --decoder-attention-heads 4 --decoder-normalize-before \
    --share-decoder-input-output-embed --dropout 0.1 --criterion "$criterion" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.01 \
    --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 400 \
    --tokens-per-sample 256 --sample-break-mode none --max-tokens 2048 --max-update "$updates" \
    --seed "$seed" --num-workers 0 --save-dir "$run_dir" --no-epoch-checkpoints \
    --log-interval 50 --log-format simple --log-file "$run_dir/train.log" \
    ${extra[@]+"${extra[@]}"}

# Blocks of 256 tokens; each token is predicted from at least 128 before it (except at the very start).
for split in valid test; do
    fairseq-eval-lm "$data/data-bin" --user-dir "$root/multimax_fairseq" --path "$run_dir/checkpoint_best.pt" \
        --gen-subset "$split" --tokens-per-sample 256 --context-window 128 --max-tokens 2048 --num-workers 0 \
        >"$run_dir/$split.eval" 2>&1 || { cat "$run_dir/$split.eval" >&2; die "fairseq-eval-lm failed"; }
    printf '%s: %s\n' "$split" "$(grep -o 'Perplexity: .*' "$run_dir/$split.eval")"
done
