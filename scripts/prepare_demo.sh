#!/usr/bin/env bash
# Makes the demo's German-English corpus: sentence pairs from a synchronous grammar, no download.
#
#     scripts/prepare_demo.sh --out data/demo
#
#   --out DIR      where the result goes (required)
#   --seed N       of the generator (default: 1)
#   --force        rebuild a folder that an earlier run made
#   --help         show this text
#
# Makes
#   DIR/raw/{train,valid,test}.{de,en}    the sentences in normal spelling: the references for SacreBLEU
#   DIR/text/{train,valid,test}.{de,en}   20,000 / 500 / 500 pairs in tokens: what fairseq-preprocess reads
#   DIR/text/{train,valid,test}.align     gold word alignments, i-j: German word i is English word j
#   DIR/data-bin                          what fairseq-train reads
#
# A second run with the same settings does nothing.

set -euo pipefail

seed=1
force=
target= # --out

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

parse_options "
--out    target  path
--seed   seed    0
--force  force   =yes
" "$@"
[[ -n $target ]] || die "--out DIR is required; see --help"

need_python
need_fairseq
begin_output "$target" "recipe=demo
seed=$seed" "$force"
run "the generator" "$PYTHON" "$scripts/make_demo_corpus.py" --out "$build/text" --seed "$seed"
mkdir "$build/raw"
for file in "$build"/text/*.de "$build"/text/*.en; do
    detokenise <"$file" >"$build/raw/${file##*/}"
done
binarise --source-lang de --target-lang en \
    --trainpref text/train --validpref text/valid --testpref text/test --workers 1
finish_output
info "done: $out (train with: fairseq-train $out/data-bin ...)"
