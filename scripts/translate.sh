#!/usr/bin/env bash
# Translates raw German, line by line, with a model that examples/*/run.sh has trained.
#
#     scripts/translate.sh --run runs/multi30k_de_en/multimax-seed1 --data data/multi30k_de_en < german > english
#     echo "Ein Hund läuft über die Straße." | scripts/translate.sh --run … --data …
#
#   --run DIR          holds checkpoint_best.pt
#   --checkpoint FILE  another checkpoint instead; several, joined by ':', make an ensemble
#   --data DIR         made by a prepare script; holds the model that cuts text into units: bpe.codes (Moses tokens and
#                      BPE, in lower case), or sentencepiece.bpe.model
#   --beam N           (default: 5)
#   --truncate         cut sentences that are too long for the model; without it the first of them is an error
#   -- OPTION ...      further options of fairseq-interactive
#   --help             show this text
#
# One sentence per line. Each is translated as it comes, so this works at a terminal too.

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

run=
checkpoint=
data=
beam=5
truncate=
extra=()

parse_options "
--run         run         path
--checkpoint  checkpoint  text
--data        data        path
--beam        beam        1
--truncate    truncate    =yes
--
" "$@"
checkpoint=${checkpoint:-${run:+$run/checkpoint_best.pt}}
[[ -n $checkpoint && -n $data ]] || die "--data, and --run or --checkpoint, are required; see --help"
[[ -d $data/data-bin ]] || die "$data has no data-bin: make it with a prepare script"
need_checkpoints "$checkpoint"
need_python
need_tool fairseq-interactive "activate the environment that holds fairseq"

if [[ -f $data/bpe.codes ]]; then
    encode=(iwslt14_text.py encode --codes "$data/bpe.codes" --language de)
    decode=(iwslt14_text.py decode --language en)
elif [[ -f $data/sentencepiece.bpe.model ]]; then
    encode=(sentencepiece_bpe.py encode --model "$data/sentencepiece.bpe.model")
    decode=(sentencepiece_bpe.py decode --model "$data/sentencepiece.bpe.model")
else
    die "$data has neither bpe.codes nor sentencepiece.bpe.model: it is not of a translation task's prepare script"
fi

work=$(temporary -d)
trap 'rm -rf "$work"' EXIT

# most_units: the most units in a sentence, with the end that fairseq adds, that the model and --max-tokens allow.
most_units() {
    local most index
    most=$("$PYTHON" "$scripts/check_model.py" --data "$data/data-bin" "--checkpoint=$checkpoint" 2>"$work/log") ||
        die "$(last_line "$work/log" | sed 's/^ERROR: //')"
    for ((index = 0; index < ${#extra[@]} - 1; index++)); do
        [[ ${extra[index]} != --max-tokens ]] || most=$((extra[index + 1] < most ? extra[index + 1] : most))
    done
    echo $((most - 1))
}

# cut_lines MOST: cut lines to so many units, and say so; 0: leave them.
cut_lines() {
    awk -v most="$1" 'most && NF > most {
        printf "WARNING: line %d is cut: it has %d units, and the model takes %d\n", NR, NF, most >"/dev/stderr"
        line = $1
        for (unit = 2; unit <= most; unit++) line = line " " $unit
        $0 = line
    } { print; fflush() }'
}

most=0
[[ -z $truncate ]] || most=$(most_units) || exit 1
# fairseq-interactive prints H-<number> <score> <units> for each sentence; everything else is for developers.
statuses=(0 0 0 0 0)
"$PYTHON" "$scripts/${encode[0]}" "${encode[@]:1}" | cut_lines "$most" |
    fairseq-interactive "$data/data-bin" --user-dir "$scripts/../multimax_fairseq" --path "$checkpoint" \
        --source-lang de --target-lang en --beam "$beam" ${extra[@]+"${extra[@]}"} 2>"$work/log" |
    awk -F '\t' -v count="$work/count" '/^H-/ { print $3; fflush(); print ++number >count; fflush(count) }' |
    "$PYTHON" "$scripts/${decode[0]}" "${decode[@]:1}" || statuses=("${PIPESTATUS[@]}")

if ((statuses[4] == 141)); then
    exit 0 # the reader of the translations has stopped
elif ((statuses[2])); then
    why=$(why_it_failed "$work/log" "$data/data-bin" "$checkpoint")
    number=$(($(tail -n 1 "$work/count" 2>/dev/null || echo 0) + 1))
    case $why in
    *"Size of sample"* | *max_tokens*) die "line $number is longer than the model or --max-tokens takes ($why):" \
        "shorten it, or let --truncate cut it" ;;
    *) die "fairseq-interactive failed: $why" ;;
    esac
fi
((statuses[0] == 0 && statuses[4] == 0)) || exit 1 # the cause has been printed
