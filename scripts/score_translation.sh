#!/usr/bin/env bash
# Translates the test set (or another) with beam search and prints detokenised SacreBLEU with its signature.
#
#     scripts/score_translation.sh --data-bin DIR --checkpoint FILE --reference FILE --out PREFIX
#
#   --data-bin DIR         binarised data
#   --split NAME           the split to translate (default: test)
#   --checkpoint FILE      a checkpoint; several, joined by ':', make an ensemble
#   --reference FILE       the same text in the target language, as published: one sentence per line
#   --sentencepiece FILE   the model that cut the data into pieces, or
#   --moses LANGUAGE       the data are BPE units of lower-case Moses tokens, as from scripts/prepare_iwslt14.sh; they
#                          are joined, detokenised, and scored ignoring case. Without either of the two options the
#                          tokens are words and punctuation, which is moved back to the word before it
#   --beam N               (default: 5)
#   --lenpen X             divide scores by length to the power X; above 1 favours longer translations (default: 1)
#   --out PREFIX           writes PREFIX.generate and PREFIX.log (fairseq-generate's output), PREFIX.hypotheses (one
#                          sentence per line, in the order of the reference) and PREFIX.bleu
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
lenpen=1
split="test"
prefix= # --out

parse_options "
--data-bin       data_bin       path
--checkpoint     checkpoint     text
--reference      reference      text
--sentencepiece  sentencepiece  path
--moses          moses          one of de en
--beam           beam           1
--lenpen         lenpen         text
--split          split          text
--out            prefix         text
" "$@"
[[ -n $data_bin && -n $checkpoint && -n $reference && -n $prefix ]] ||
    die "--data-bin, --checkpoint, --reference and --out are required; see --help"
[[ -z $sentencepiece || -z $moses ]] || die "--sentencepiece and --moses exclude each other; see --help"
[[ $lenpen =~ ^[0-9]*\.?[0-9]+$ ]] || die "--lenpen takes a number, such as 1.2: got '$lenpen'"
need_checkpoints "$checkpoint"
[[ -d $data_bin ]] || die "--data-bin $data_bin: there is no such folder"
for file in "$reference" ${sentencepiece:+"$sentencepiece"}; do need_file "$file"; done
! LC_ALL=C grep -q $'\r.' "$reference" || # SacreBLEU would read it as a line end
    die "$reference has carriage returns within its lines: remove them (tr -d '\\r')"
need_python
need_tool fairseq-generate "activate the environment that holds fairseq"
need_tool sacrebleu "$PYTHON -m pip install sacrebleu"
references=$(count_lines "$reference")
sentences=$(count_sentences "$data_bin" "$split")
((sentences == references)) ||
    die "$references lines in $reference for the $sentences sentences of '$split' in $data_bin: they have to be" \
        "translations line by line"

pieces=()
metric=()
[[ -z $sentencepiece ]] || pieces=(--bpe sentencepiece --sentencepiece-model "$sentencepiece")
[[ -z $moses ]] || metric=(--lowercase)

# Everything is made in a folder beside, then moved: so the files are whole, and from one translation.
make_folder "$(dirname "$prefix")"
out=$(absolute_path "$prefix") # whose disk may be full
build=$(mktemp -d "$out.XXXXXX" 2>/dev/null) || die "no folder can be made beside $prefix"
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Without --required-batch-size-multiple 1, fairseq's main branch leaves out up to 7 sentences that do not fill a batch.
fairseq-generate "$data_bin" --user-dir "$scripts/../multimax_fairseq" --path "$checkpoint" --gen-subset "$split" \
    --beam "$beam" --lenpen "$lenpen" --max-tokens 8192 --required-batch-size-multiple 1 --num-workers 0 ${pieces[@]+"${pieces[@]}"} \
    >"$build/generate" 2>"$build/log" ||
    die "fairseq-generate failed: $(why_it_failed "$build/log" "$data_bin" "$checkpoint" "$split")"

# D-<index> <score> <sentence>, in order of length: back to the order of the reference.
sed -n 's/^D-//p' "$build/generate" | sort -n -k 1,1 | cut -f 3 >"$build/tokens" ||
    die "the translations could not be sorted"
if [[ -n $sentencepiece ]]; then
    mv "$build/tokens" "$build/hypotheses"
elif [[ -n $moses ]]; then
    filter "the detokenisation" "$build/tokens" "$build/hypotheses" \
        "$PYTHON" "$scripts/iwslt14_text.py" decode --language "$moses"
else
    detokenise <"$build/tokens" >"$build/hypotheses"
fi
hypotheses=$(count_lines "$build/hypotheses")
((hypotheses == references)) || die "$hypotheses translations for $references references: some were lost on the way"
filter "sacrebleu" /dev/null "$build/bleu" sacrebleu "$reference" --input "$build/hypotheses" --metrics bleu --width 2 \
    --format text ${metric[@]+"${metric[@]}"}
[[ $(<"$build/bleu") == *" = "[0-9]* ]] || die "sacrebleu printed no score"
for kind in generate log hypotheses bleu; do
    mv -f "$build/$kind" "$prefix.$kind" || die "$prefix.$kind cannot be written"
done
cat "$prefix.bleu"
