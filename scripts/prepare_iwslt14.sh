#!/usr/bin/env bash
# IWSLT'14 German-English (Cettolo et al. 2014): subtitles of TED talks, 160,239 sentence pairs for training, 7,283 for
# validation, 6,750 for test. Makes the same text as fairseq's recipe (examples/translation/prepare-iwslt14.sh) from the
# same archive, without Perl and Moses.
#
#     scripts/prepare_iwslt14.sh --out data/iwslt14
#
#   --out DIR       where the result goes (required)
#   --archive FILE  the published de-en.tgz, if you have it; then nothing is downloaded
#   --url URL       download the archive from URL (default: $IWSLT14_URL, else fairseq's copy, 19 MB)
#   --merges N      of joint BPE (default: 10000)
#   --workers N     processes for fairseq-preprocess; the result is the same (default: 2)
#   --force         rebuild a folder that an earlier run made
#   --help          show this text
#
# Makes
#   DIR/raw/{train,valid,test}.{de,en}    the sentences before tokenisation: the references for SacreBLEU (with its
#                                         --lowercase, as a model that reads DIR/text writes lower case)
#   DIR/bpe.codes                         joint BPE, learned on the training text
#   DIR/text/{train,valid,test}.{de,en}   Moses tokens in lower case, in subwords: what fairseq-preprocess reads
#   DIR/data-bin                          what fairseq-train reads, a dictionary for each language
#
# A second run with the same settings does nothing. An interrupted run leaves nothing but DIR.download, from which the
# next one resumes. PYTHON chooses the interpreter (default: python).

set -euo pipefail

readonly SPLITS=(train valid test)
readonly URL_DEFAULT=http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz

merges=10000
workers=2
force=
archive= # --archive
url=     # --url
target=  # --out

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
instead="--archive FILE with an archive you already have"

readonly OPTIONS="
--out      target   path
--archive  archive  text
--url      url      text
--merges   merges   1
--workers  workers  1
--force    force    =yes
"

# The files of the archive that hold the text.
archive_files() {
    local language set
    for language in de en; do
        echo "train.tags.de-en.$language"
        for set in TED.dev2010 TEDX.dev2012 TED.tst2010 TED.tst2011 TED.tst2012; do
            echo "IWSLT14.$set.de-en.$language.xml"
        done
    done
}

# known_pairs SPLIT: how many sentence pairs the published data have.
known_pairs() {
    case $1 in
    train) echo 160239 ;;
    valid) echo 7283 ;;
    test) echo 6750 ;;
    esac
}

check_pairs() {
    local split found counts=()
    for split in "${SPLITS[@]}"; do
        found=$(count_lines "$build/text/$split.de")
        counts+=("$found")
        ((found)) || die "no sentence pair is left for $split: ${archive##*/} has too little text"
    done
    info "sentence pairs: ${counts[0]} train, ${counts[1]} valid, ${counts[2]} test" \
        "(published: $(known_pairs train), $(known_pairs valid), $(known_pairs test))"
    for split in "${SPLITS[@]}"; do
        found=$(count_lines "$build/text/$split.de")
        ((found == $(known_pairs "$split"))) ||
            warn "$split: $found sentence pairs, the published IWSLT'14 has $(known_pairs "$split")"
    done
}

main() {
    local names
    parse_options "$OPTIONS" "$@"
    [[ -n $target ]] || die "--out DIR is required; see --help"
    need_python
    need_module sacremoses
    need_module subword_nmt
    need_fairseq
    choose_archive "$URL_DEFAULT" "${IWSLT14_URL:-}"
    begin_output "$target" "recipe=iwslt14
source=${archive:-$url}
merges=$merges" "$force"

    fetch_archive de-en.tgz
    read -r -d '' -a names < <(archive_files) || true
    mkdir "$build/archive"
    unpack "$archive" "$build/archive" "${names[@]}"
    info "tokenising, and learning $merges merges of subwords: a few minutes"
    run_with_progress "the preparation of the text" \
        "$PYTHON" "$scripts/iwslt14_text.py" prepare --from "$build/archive" --out "$build" --merges "$merges"
    rm -r "$build/archive"
    check_pairs
    binarise --source-lang de --target-lang en \
        --trainpref text/train --validpref text/valid --testpref text/test --workers "$workers"
    finish_output
    info "done: $out (train with: fairseq-train $out/data-bin ...)"
}

main "$@"
