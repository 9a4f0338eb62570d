#!/usr/bin/env bash
# Multi30k German-English (Elliott, Frank, Sima'an and Specia 2016): image descriptions, 29,000 sentence pairs for
# training, 1,014 for validation, 1,000 for test (2016 Flickr). A translation task small enough for a laptop.
#
#     bash scripts/prepare_multi30k.sh --out data/multi30k_de_en
#
# makes raw/{train,valid,test}.{de,en}   the text as published: references for SacreBLEU
#       sentencepiece.bpe.model          joint BPE, learned on the training text
#       text/{train,valid,test}.{de,en}  the text in pieces: what fairseq-preprocess reads
#       data-bin                         what fairseq-train reads, one dictionary for both languages

set -euo pipefail
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# The steps below run in a folder beside --out, which becomes --out when they are done; --help lists the options.
[[ ${PREPARING:-} == yes ]] || exec "${PYTHON:-python}" "$scripts/prepare.py" run "$0" "$@"

for language in de en; do
    "$PYTHON" "$scripts/prepare.py" take "$SOURCE" raw/train.$language= \
        raw/valid.$language=val.$language raw/test.$language=test_2016_flickr.$language
done
"$PYTHON" "$scripts/prepare.py" pairs raw/train=29000 raw/valid=1014 raw/test=1000

pieces=("$PYTHON" "$scripts/sentencepiece_bpe.py")
"${pieces[@]}" train --model sentencepiece.bpe.model --vocab-size "$VOCAB_SIZE" raw/train.{de,en}
mkdir text
for file in raw/*; do
    "${pieces[@]}" encode --model sentencepiece.bpe.model <"$file" >"text/${file##*/}"
done

fairseq-preprocess --source-lang de --target-lang en --joined-dictionary --trainpref text/train \
    --validpref text/valid --testpref text/test --destdir data-bin --workers "$WORKERS" >log 2>&1
