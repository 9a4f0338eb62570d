#!/usr/bin/env bash
# Trains a small Transformer on Multi30k German-English and scores it on test_2016_flickr.
#
#     examples/multi30k_de_en/train.sh --data data/multi30k --mapping multimax --seed 1 --out runs/multimax-1
#
#   --data DIR        made by scripts/prepare_multi30k.sh (default: data/multi30k)
#   --mapping NAME    of attention: multimax, softmax, sparsemax, entmax15, entmax, evsoftmax
#                     (default: multimax), or stock: fairseq's own architecture
#   --seed N          (default: 1)
#   --epochs N        (default: 20)
#   --out DIR         checkpoints, logs and hypotheses (default: runs/multi30k-MAPPING-SEED);
#                     run it again with the same DIR and it goes on from the last checkpoint
#   -- OPTION ...     further options of fairseq-train, such as --attention-mapping-sites cross
#   --help            show this text

set -euo pipefail

here=$(cd "$(dirname "$0")" >/dev/null && pwd)
scripts=$here/../../scripts
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

data=data/multi30k
mapping=multimax
seed=1
epochs=20
run_dir=
extra=()

while (($#)); do
    case $1 in
    --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --out=DIR is --out DIR
    --help | -h) show_help "$0"; exit ;;
    --data) need_value "$@"; data=$2; shift 2 ;;
    --mapping) need_value "$@"; mapping=$2; shift 2 ;;
    --seed) need_number "$1" "${2-}" 1; seed=$2; shift 2 ;;
    --epochs) need_number "$1" "${2-}" 1; epochs=$2; shift 2 ;;
    --out) need_value "$@"; run_dir=$2; shift 2 ;;
    --) shift; extra=("$@"); break ;;
    *) die "unknown option '$1'; see --help" ;;
    esac
done
run_dir=${run_dir:-runs/multi30k-$mapping-$seed}
[[ -d $data/data-bin ]] || die "$data has no data-bin: make it with scripts/prepare_multi30k.sh --out $data"
need_tool fairseq-train "activate the environment that holds fairseq"

if [[ $mapping == stock ]]; then
    model=(--arch transformer)
else
    model=(--arch multimax_transformer --attention-mapping "$mapping")
fi
# 4+4 layers of width 128: 2.3M parameters, 1.0M of them the embeddings of the pieces.
model+=(--encoder-layers 4 --encoder-embed-dim 128 --encoder-ffn-embed-dim 256 --encoder-attention-heads 4
    --decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 256 --decoder-attention-heads 4
    --share-all-embeddings --dropout 0.3)

mkdir -p "$run_dir"
# With the plugin for stock, too: to resume, torch 2.6 and later have to be told that its checkpoints are safe.
fairseq-train "$data/data-bin" --user-dir "$here/../../multimax_fairseq" "${model[@]}" \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --lr 5e-3 --lr-scheduler inverse_sqrt --warmup-updates 2000 \
    --max-tokens 4096 --max-epoch "$epochs" --seed "$seed" --num-workers 0 \
    --save-dir "$run_dir" --no-epoch-checkpoints --log-interval 50 --log-format simple \
    --log-file "$run_dir/train.log" ${extra[@]+"${extra[@]}"}

bash "$scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run_dir/checkpoint_best.pt" \
    --reference "$data/raw/test.en" --sentencepiece "$data/sentencepiece.bpe.model" --out "$run_dir/test"
