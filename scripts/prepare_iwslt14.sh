#!/usr/bin/env bash
# IWSLT'14 German-English (Cettolo et al. 2014): subtitles of TED talks, 160,239 sentence pairs for training, 7,283 for
# validation, 6,750 for test. The same text as fairseq's recipe (examples/translation/prepare-iwslt14.sh) makes from the
# same archive, without Perl and Moses.
#
#     bash scripts/prepare_iwslt14.sh --out data/iwslt14_de_en
#
# makes raw/{train,valid,test}.{de,en}   the sentences before tokenisation: references for SacreBLEU (with --lowercase)
#       bpe.codes                        joint BPE, learned on the training text
#       text/{train,valid,test}.{de,en}  Moses tokens in lower case, in subwords: what fairseq-preprocess reads
#       data-bin                         what fairseq-train reads, a dictionary for each language

set -euo pipefail
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# The steps below run in a folder beside --out, which becomes --out when they are done; --help lists the options.
[[ ${PREPARING:-} == yes ]] || exec "${PYTHON:-python}" "$scripts/prepare.py" run "$0" "$@"

files=(archive/train.tags.de-en.{de,en}"=")
for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
    files+=("archive/IWSLT14.$set.de-en."{de,en}".xml=")
done
"$PYTHON" "$scripts/prepare.py" take "$SOURCE" "${files[@]}"

# remove markup, tokenise, keep pairs of 1 to 175 tokens and a ratio up to 1.5, lower case, subwords: some minutes
"$PYTHON" "$scripts/iwslt14_text.py" --from archive --out . --merges "$MERGES"
rm -r archive
"$PYTHON" "$scripts/prepare.py" pairs text/train=160239 text/valid=7283 text/test=6750

fairseq-preprocess --source-lang de --target-lang en --trainpref text/train --validpref text/valid \
    --testpref text/test --destdir data-bin --workers "$WORKERS" >log 2>&1
