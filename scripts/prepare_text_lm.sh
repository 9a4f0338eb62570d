#!/usr/bin/env bash
# Turns any tokenised text into the data of a language model: Brown, WikiText, or your own.
#
#     bash scripts/prepare_text_lm.sh --from FOLDER --out data/brown_lm --min-count 5
#
# FOLDER holds {train,valid,test}.tokens or wiki.{train,valid,test}.tokens, plain or .gz: UTF-8, words between blanks.
#
# makes text/{train,valid,test}.tokens  the text, unchanged: what fairseq-preprocess reads
#       data-bin                        what fairseq-train --task language_modeling reads

set -euo pipefail
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# The steps below run in a folder beside --out, which becomes --out when they are done; --help lists the options.
[[ ${PREPARING:-} == yes ]] || exec "${PYTHON:-python}" "$scripts/prepare.py" run "$0" "$@"

"$PYTHON" "$scripts/prepare.py" take "$SOURCE" text/train.tokens=,wiki.train.tokens \
    text/valid.tokens=,wiki.valid.tokens text/test.tokens=,wiki.test.tokens

# Words of validation and test that training lacks become <unk>; if training has none, its probability is never learned.
((MIN_COUNT > 1)) || grep -qw '<unk>' text/train.tokens ||
    echo "WARNING: the training text has no <unk>, so new words cannot be scored: consider --min-count 2" >&2

fairseq-preprocess --only-source --trainpref text/train.tokens --validpref text/valid.tokens \
    --testpref text/test.tokens --destdir data-bin --workers "$WORKERS" --thresholdsrc "$MIN_COUNT" >log 2>&1
