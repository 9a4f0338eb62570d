#!/usr/bin/env bash
# WikiText-103 (Merity, Xiong, Bradbury and Socher 2017): articles of the English Wikipedia, 103 million tokens, in the
# tokenised version with <unk>, not the raw one. Or WikiText-2, its smaller version: 2 million tokens, the same articles
# for validation and test.
#
#     bash scripts/prepare_wikitext103.sh --out data/wikitext103
#     bash scripts/prepare_wikitext103.sh --out data/wikitext2 --corpus wikitext-2
#
# makes text/{train,valid,test}.tokens  the text, unchanged: what fairseq-preprocess reads
#       data-bin                        what fairseq-train --task language_modeling reads

set -euo pipefail
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# The steps below run in a folder beside --out, which becomes --out when they are done; --help lists the options.
[[ ${PREPARING:-} == yes ]] || exec "${PYTHON:-python}" "$scripts/prepare.py" run "$0" "$@"

"$PYTHON" "$scripts/prepare.py" take "$SOURCE" text/train.tokens=wiki.train.tokens \
    text/valid.tokens=wiki.valid.tokens text/test.tokens=wiki.test.tokens

fairseq-preprocess --only-source --trainpref text/train.tokens --validpref text/valid.tokens \
    --testpref text/test.tokens --destdir data-bin --workers "$WORKERS" >log 2>&1

# The tokens, with line ends, are those of the paper's table 1. Its 267,735 and 33,278 types include the line end and
# <unk>; fairseq adds two more, and fills up to a multiple of 8.
published=(train=103227021 types=267744)
[[ $CORPUS == wikitext-103 ]] || published=(train=2088628 types=33280)
"$PYTHON" "$scripts/prepare.py" tokens data-bin "${published[@]}" valid=217646 test=245569
