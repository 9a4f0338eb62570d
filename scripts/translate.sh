#!/usr/bin/env bash
# Translates raw German, line by line, with a model that examples/*/run.sh has trained.
#
#     scripts/translate.sh --run runs/multi30k_de_en/multimax-seed1 --data data/multi30k_de_en < german > english
#     echo "Ein Hund läuft über die Straße." | scripts/translate.sh --run … --data …
#
#   --run DIR          holds checkpoint_best.pt
#   --checkpoint FILE  another checkpoint instead; several, joined by ':', make an ensemble
#   --data DIR         made by a prepare script. What it was cut into units with is found there: bpe.codes (Moses
#                      tokens and BPE, in lower case), or sentencepiece.bpe.model
#   --beam N           (default: 5)
#   -- OPTION ...      further options of fairseq-interactive
#   --help             show this text
#
# One sentence a line. Each is translated as it comes, so it can be used at a terminal too.

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

checkpoint=
data=
beam=5
extra=()

while (($#)); do
    case $1 in
    --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --data=DIR is --data DIR
    --help | -h) show_help "$0"; exit ;;
    --run) need_value "$@"; checkpoint=$2/checkpoint_best.pt; shift 2 ;;
    --checkpoint) need_value "$@"; checkpoint=$2; shift 2 ;;
    --data) need_value "$@"; data=$2; shift 2 ;;
    --beam) need_number "$1" "${2-}" 1; beam=$2; shift 2 ;;
    --) shift; extra=("$@"); break ;;
    *) die "unknown option '$1'; see --help" ;;
    esac
done
[[ -n $checkpoint && -n $data ]] || die "--data, and --run or --checkpoint, are required; see --help"
[[ -d $data/data-bin ]] || die "$data has no data-bin: make it with a prepare script"
IFS=: read -r -a checkpoints <<<"$checkpoint"
for file in "${checkpoints[@]}"; do
    [[ -f $file ]] || die "$file: there is no such file"
done
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

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# fairseq-interactive numbers sentences and says H-<number> <score> <units>; everything else is for developers.
"$PYTHON" "$scripts/${encode[0]}" "${encode[@]:1}" |
    { fairseq-interactive "$data/data-bin" --user-dir "$scripts/../multimax_fairseq" --path "$checkpoint" \
        --source-lang de --target-lang en --beam "$beam" ${extra[@]+"${extra[@]}"} 2>"$log" ||
        { tail -n 15 "$log" >&2; die "fairseq-interactive failed; its last lines are above"; }; } |
    awk -F '\t' '/^H-/ { print $3; fflush() }' |
    "$PYTHON" "$scripts/${decode[0]}" "${decode[@]:1}"
