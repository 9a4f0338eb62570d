#!/usr/bin/env bash
# WikiText-103 (Merity, Xiong, Bradbury and Socher 2017): articles of the English Wikipedia, 103 million tokens, in the
# tokenised version with <unk>, not the raw one. Or WikiText-2, its smaller version: 2 million tokens, the same articles
# for validation and test.
#
#     scripts/prepare_wikitext103.sh --out data/wikitext-103
#     scripts/prepare_wikitext103.sh --corpus wikitext-2 --out data/wikitext-2
#
#   --out DIR        where the result goes (required)
#   --corpus NAME    wikitext-103 (default) or wikitext-2
#   --archive FILE   the published wikitext-103-v1.zip or wikitext-2-v1.zip, if you have it; then nothing is downloaded
#   --url URL        download the archive (190 MB; WikiText-2: 5 MB) from URL, or from the first of several, separated by
#                    blanks, that has it (default: $WIKITEXT_URL, else the mirrors that this script knows)
#   --no-checksum    accept a download that is not the archive this script knows
#   --workers N      processes for fairseq-preprocess; the result is the same (default: 2)
#   --force          rebuild a folder that an earlier run made
#   --help           show this text
#
# Makes
#   DIR/text/{train,valid,test}.tokens    the text, unchanged: what fairseq-preprocess reads
#   DIR/data-bin                          what fairseq-train --task language_modeling reads
#
# A second run with the same settings does nothing. An interrupted run leaves nothing but DIR.download, from which the
# next one resumes. PYTHON chooses the interpreter (default: python).

set -euo pipefail

readonly SPLITS=(train valid test)
readonly MIRRORS=(https://wikitext.smerity.com https://s3.amazonaws.com/research.metamind.io/wikitext)

# SHA-256 of the zips.
readonly CHECKSUMS="
242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590  wikitext-103-v1.zip
92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c  wikitext-2-v1.zip"

corpus=wikitext-103
workers=2
checksum=yes
force=
archive= # --archive
url=     # --url
target=  # --out

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
instead="--archive FILE with an archive you already have"

readonly OPTIONS="
--out          target    path
--corpus       corpus    one of wikitext-103 wikitext-2
--archive      archive   text
--url          url       text
--no-checksum  checksum  =
--workers      workers   1
--force        force     =yes
"

# known_counts: tokens of train, valid and test, including line ends; entries of the dictionary. The tokens are those of
# the paper's table 1. Its 267,735 and 33,278 types include the line end and <unk>; fairseq adds two more and fills up
# to a multiple of 8.
known_counts() {
    case $corpus in
    wikitext-103) echo 103227021 217646 245569 267744 ;;
    wikitext-2) echo 2088628 217646 245569 33280 ;;
    esac
}

# check_archive FILE: is it the published one?
check_archive() {
    local name=$corpus-v1.zip
    ! grep -qx "$(sha256 "$1")  $name" <<<"$CHECKSUMS" || return 0
    if is_web_page "$1"; then
        reject "$1" "is a web page, not an archive"
    fi
    if [[ $1 == "$out.download/"* ]]; then
        [[ -z $checksum ]] ||
            reject "$1" "is not the file this script knows, by its SHA-256 (--no-checksum accepts it)"
    else
        warn "$1 is not the published $name, by its SHA-256"
    fi
}

# check_counts: compare fairseq-preprocess's counts with the published numbers.
check_counts() {
    local log=$build/data-bin/preprocess.log known split found index
    read -r -a known < <(known_counts)
    for index in 0 1 2; do
        split=${SPLITS[$index]}
        found=$(sed -n "s/.*text\/$split\.tokens: .* sents, \([0-9]*\) tokens.*/\1/p" "$log")
        found=${found:-0}
        ((found == known[index])) || warn "$split: $found tokens, the published $corpus has ${known[$index]}"
    done
    found=$(sed -n 's/.*Dictionary: \([0-9]*\) types.*/\1/p' "$log" | head -n 1)
    found=${found:-0}
    ((found == known[3])) || warn "dictionary: $found entries, the published $corpus has ${known[3]}"
}

main() {
    local split
    parse_options "$OPTIONS" "$@"
    [[ -n $target ]] || die "--out DIR is required; see --help"
    need_python
    need_fairseq
    choose_archive "${MIRRORS[*]/%//$corpus-v1.zip}" "${WIKITEXT_URL:-}"
    begin_output "$target" "recipe=$corpus
source=${archive:-$url}" "$force"

    fetch_archive "$corpus-v1.zip"
    check_archive "$archive"
    mkdir "$build/text"
    unpack "$archive" "$build/text" wiki.train.tokens wiki.valid.tokens wiki.test.tokens
    for split in "${SPLITS[@]}"; do
        mv "$build/text/wiki.$split.tokens" "$build/text/$split.tokens"
        check_text "$build/text/$split.tokens" "$archive" "wiki.$split.tokens"
    done
    binarise --only-source --trainpref text/train.tokens --validpref text/valid.tokens --testpref text/test.tokens \
        --workers "$workers"
    check_counts
    finish_output
    info "done: $out (train with: fairseq-train --task language_modeling $out/data-bin ...)"
}

main "$@"
