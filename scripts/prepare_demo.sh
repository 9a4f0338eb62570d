#!/usr/bin/env bash
# The demo's German-English corpus: sentence pairs from a synchronous grammar, no download.
#
#     bash scripts/prepare_demo.sh --out data/demo
#
# makes raw/{train,valid,test}.{de,en}   the sentences in normal spelling: references for SacreBLEU
#       text/{train,valid,test}.{de,en}  20,000 / 500 / 500 pairs in tokens: what fairseq-preprocess reads
#       text/{train,valid,test}.align    gold word alignments, i-j: German word i is English word j
#       data-bin                         what fairseq-train reads

set -euo pipefail
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# The steps below run in a folder beside --out, which becomes --out when they are done; --help lists the options.
[[ ${PREPARING:-} == yes ]] || exec "${PYTHON:-python}" "$scripts/prepare.py" run "$0" "$@"

"$PYTHON" "$scripts/make_demo_corpus.py" --out text --seed "$SEED"
mkdir raw
for file in text/*.{de,en}; do
    sed 's/ \([.,?!]\)/\1/g' "$file" >"raw/${file##*/}" # punctuation back to the word before it
done

fairseq-preprocess --source-lang de --target-lang en --trainpref text/train --validpref text/valid \
    --testpref text/test --destdir data-bin --workers "$WORKERS" >log 2>&1
