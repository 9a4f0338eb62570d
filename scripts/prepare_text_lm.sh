#!/usr/bin/env bash
# Turns any tokenised text into language-model data: WikiText-103, WikiText-2, Brown, or your own.
#
#     scripts/prepare_text_lm.sh --from wikitext-103 --out data/wikitext-103
#
#   --out DIR          where the result goes (required)
#   --from DIR         holds {train,valid,test}.tokens or wiki.{train,valid,test}.tokens, plain or
#                      .gz: UTF-8, words separated by blanks. Default: $MULTIMAX_DATA/brown, if
#                      MULTIMAX_DATA is set and the folder is there
#   --min-count N      words seen fewer than N times in the training text become <unk> (default: 0,
#                      keep all; right for WikiText, whose text has its own <unk>)
#   --max-vocab N      keep the most frequent words only, for N entries with fairseq's four special
#                      ones; fairseq then fills up to a multiple of 8 (default: keep all)
#   --workers N        processes for fairseq-preprocess; the result is the same (default: 2)
#   --force            rebuild a folder that an earlier run made
#   --help             show this text
#
# Makes
#   DIR/text/{train,valid,test}.tokens    the text, unchanged: what fairseq-preprocess reads
#   DIR/data-bin                          what fairseq-train --task language_modeling reads
#
# A second run with the same settings does nothing. An interrupted run leaves nothing.
# PYTHON chooses the interpreter (default: python).

set -euo pipefail

readonly SPLITS=(train valid test)

min_count=0
max_vocab= # empty: all words
workers=2
force=
folder= # --from
target= # --out

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

readonly OPTIONS="
--out        target     path
--from       folder     text
--min-count  min_count  0
--max-vocab  max_vocab  5
--workers    workers    1
--force      force      =yes
"

choose_source() {
    local split source
    if [[ -z $folder && -n ${MULTIMAX_DATA:-} && -d $MULTIMAX_DATA/brown ]]; then
        folder=$MULTIMAX_DATA/brown
        info "using $folder (from MULTIMAX_DATA)"
    fi
    [[ -n $folder ]] || die "--from DIR is required; see --help"
    [[ -d $folder ]] || die "--from $folder: there is no such folder"
    folder=$(absolute_path "$folder")
    for split in "${SPLITS[@]}"; do
        source=$(text_of "$split")
        [[ -z $source ]] || digest "$source"
    done
}

# text_of SPLIT: the file in $folder, under either name; nothing if it is missing.
text_of() { find_text "$folder" "$1.tokens" "wiki.$1.tokens"; }

extract_all() {
    local split missing=""
    for split in "${SPLITS[@]}"; do
        [[ -n $(text_of "$split") ]] || missing+=" $split.tokens"
    done
    [[ -z $missing ]] || die "$folder lacks$missing (or wiki.*, or the same with .gz): all three splits are" \
        "needed; put them there or choose another --from"
    for split in "${SPLITS[@]}"; do
        extract "$(text_of "$split")" "$build/text/$split.tokens"
        check_text "$build/text/$split.tokens" "$(text_of "$split")"
    done
}

# Words of validation and test that training lacks become <unk>. It has to occur in the training
# data, or its probability is never learned and dominates the perplexity.
check_unknown() {
    if ((min_count < 2)) && [[ -z $max_vocab ]] &&
        ! LC_ALL=C grep -qE '(^|[[:space:]])<unk>([[:space:]]|$)' "$build/text/train.tokens"; then
        warn "the training text has no <unk>, so new words cannot be scored: consider --min-count 2"
    fi
}

main() {
    parse_options "$OPTIONS" "$@"
    [[ -n $target ]] || die "--out DIR is required; see --help"
    need_python
    need_fairseq
    choose_source
    begin_output "$target" "recipe=text_lm
source=$folder
min-count=$min_count
max-vocab=${max_vocab:-all}" "$force"

    mkdir "$build/text"
    extract_all
    check_unknown
    binarise --only-source --trainpref text/train.tokens --validpref text/valid.tokens \
        --testpref text/test.tokens --thresholdsrc "$min_count" ${max_vocab:+--nwordssrc "$max_vocab"} \
        --workers "$workers"
    finish_output
    info "done: $out (train with: fairseq-train --task language_modeling $out/data-bin ...)"
}

main "$@"
