#!/usr/bin/env bash
# Translates the test set with beam search and prints detokenised SacreBLEU with its signature.
#
#     scripts/score_translation.sh --data-bin DIR --checkpoint FILE --reference FILE --out PREFIX
#
#   --data-bin DIR         binarised data whose test split is translated
#   --checkpoint FILE      a checkpoint; several, joined by ':', make an ensemble
#   --reference FILE       the test set in the target language, as published: one sentence a line
#   --sentencepiece FILE   the model that the data was cut into pieces with, or
#   --moses LANGUAGE       the data are BPE units of lower-case Moses tokens, as scripts/prepare_iwslt14.sh makes them:
#                          joined, detokenised, and scored without regard to case. Without either of the two the
#                          tokens are words and punctuation, which is moved back to the word before it
#   --beam N               (default: 5)
#   --out PREFIX           writes PREFIX.generate and PREFIX.log (what fairseq-generate prints), PREFIX.hypotheses (one
#                          sentence a line, in the order of the reference) and PREFIX.bleu
#   --help                 show this text

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

data_bin=
checkpoint=
reference=
sentencepiece=
moses= # the target language
beam=5
prefix= # --out

parse_options "
--data-bin       data_bin       text
--checkpoint     checkpoint     text
--reference      reference      text
--sentencepiece  sentencepiece  text
--moses          moses          text
--beam           beam           1
--out            prefix         text
" "$@"
[[ -n $data_bin && -n $checkpoint && -n $reference && -n $prefix ]] ||
    die "--data-bin, --checkpoint, --reference and --out are required; see --help"
[[ -z $sentencepiece || -z $moses ]] || die "--sentencepiece and --moses exclude each other; see --help"
[[ -d $data_bin ]] || die "--data-bin $data_bin: there is no such folder"
IFS=: read -r -a checkpoints <<<"$checkpoint"
for file in "${checkpoints[@]}" "$reference" ${sentencepiece:+"$sentencepiece"}; do
    [[ -f $file ]] || die "$file: there is no such file"
done
need_tool fairseq-generate "activate the environment that holds fairseq"
need_tool sacrebleu "$PYTHON -m pip install sacrebleu"

pieces=()
metric=()
[[ -z $sentencepiece ]] || pieces=(--bpe sentencepiece --sentencepiece-model "$sentencepiece")
[[ -z $moses ]] || metric=(--lowercase)

# Without --required-batch-size-multiple 1, fairseq's main branch leaves out up to 7 sentences that do not fill a batch.
# What is written is built beside and renamed, so that a file that is there is whole.
mkdir -p "$(dirname "$prefix")"
trap 'rm -f "$prefix".*.part' EXIT
fairseq-generate "$data_bin" --user-dir "$scripts/../multimax_fairseq" --path "$checkpoint" --gen-subset test \
    --beam "$beam" --max-tokens 8192 --required-batch-size-multiple 1 --num-workers 0 ${pieces[@]+"${pieces[@]}"} \
    >"$prefix.generate.part" 2>"$prefix.log" || { tail -n 15 "$prefix.log" >&2; die "fairseq-generate failed"; }
mv "$prefix.generate.part" "$prefix.generate"

# D-<index> <score> <sentence>, in order of length: back to the order of the reference.
sed -n 's/^D-//p' "$prefix.generate" | sort -n -k 1,1 | cut -f 3 >"$prefix.tokens.part"
if [[ -n $sentencepiece ]]; then
    mv "$prefix.tokens.part" "$prefix.hypotheses.part"
elif [[ -n $moses ]]; then
    "$PYTHON" "$scripts/iwslt14_text.py" decode --language "$moses" <"$prefix.tokens.part" >"$prefix.hypotheses.part"
else
    detokenise <"$prefix.tokens.part" >"$prefix.hypotheses.part"
fi
hypotheses=$(count_lines "$prefix.hypotheses.part")
references=$(count_lines "$reference")
((hypotheses == references)) ||
    die "$hypotheses translations for $references references: is $reference the test set of $data_bin?"
mv "$prefix.hypotheses.part" "$prefix.hypotheses"

sacrebleu "$reference" --input "$prefix.hypotheses" --metrics bleu --width 2 --format text \
    ${metric[@]+"${metric[@]}"} >"$prefix.bleu.part"
mv "$prefix.bleu.part" "$prefix.bleu"
cat "$prefix.bleu"
