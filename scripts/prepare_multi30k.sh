#!/usr/bin/env bash
# Multi30k German-English (Elliott, Frank, Sima'an and Specia 2016): image descriptions, 29,000
# sentence pairs for training, 1,014 for validation, 1,000 for test (2016 Flickr). A translation
# task small enough for a laptop.
#
#     scripts/prepare_multi30k.sh --out data/multi30k
#
#   --out DIR          where the result goes (required)
#   --from DIR         use the files in DIR and download nothing: {train,val,test_2016_flickr}.{de,en},
#                      plain or .gz. Default: $MULTIMAX_DATA/multi30k, if MULTIMAX_DATA is set
#                      and the folder is there
#   --url URL          download the .gz files from URL (default: $MULTI30K_URL, else the
#                      authors' repository, multi30k/dataset on GitHub)
#   --no-checksum      accept downloads whose text is not the one this script knows
#   --vocab-size N     SentencePiece pieces, joint for both languages (default: 6000)
#   --workers N        processes for fairseq-preprocess; the result is the same (default: 2)
#   --force            rebuild a folder that an earlier run made
#   --help             show this text
#
# Makes
#   DIR/raw/{train,valid,test}.{de,en}    the text as published: the references for SacreBLEU
#   DIR/sentencepiece.bpe.model           joint BPE, learned on the training text
#   DIR/text/{train,valid,test}.{de,en}   the text in pieces: what fairseq-preprocess reads
#   DIR/data-bin                          what fairseq-train reads, one dictionary for both languages
#
# A second run with the same settings does nothing. An interrupted run leaves nothing but
# DIR.download, from which the next one resumes. PYTHON chooses the interpreter (default: python).

set -euo pipefail

readonly SPLITS=(train valid test)
readonly LANGUAGES=(de en)
readonly URL_DEFAULT=https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw

# SHA-256 of the text, not of the .gz, which recompressing changes.
readonly CHECKSUMS="
2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72  train.de
460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6  train.en
660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660  val.de
1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227  val.en
4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16  test_2016_flickr.de
399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182  test_2016_flickr.en"

vocab_size=6000
workers=2
checksum=yes
force=
folder= # --from
url=    # --url
target= # --out

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

readonly OPTIONS="
--out          target      path
--from         folder      text
--url          url         text
--no-checksum  checksum    =
--vocab-size   vocab_size  1
--workers      workers     1
--force        force       =yes
"

# source_name SPLIT: what the repository calls fairseq's split.
source_name() {
    case $1 in
    valid) echo val ;;
    test) echo test_2016_flickr ;;
    *) echo "$1" ;;
    esac
}

# known_pairs SPLIT: how many sentence pairs the published split has.
known_pairs() {
    case $1 in
    train) echo 29000 ;;
    valid) echo 1014 ;;
    test) echo 1000 ;;
    esac
}

# Choose the source of the text: $folder if it is there, else $url.
choose_source() {
    url=${url:-${MULTI30K_URL:-}}
    if [[ -z $folder && -z $url && -n ${MULTIMAX_DATA:-} && -d $MULTIMAX_DATA/multi30k ]]; then
        folder=$MULTIMAX_DATA/multi30k
        info "using $folder (from MULTIMAX_DATA)"
    fi
    if [[ -n $folder ]]; then
        [[ -d $folder ]] || die "--from $folder: there is no such folder"
        folder=$(absolute_path "$folder")
        url=
        digest_source
    else
        url=${url:-$URL_DEFAULT}
        url=${url%/}
    fi
}

digest_source() {
    local split language source
    for split in "${SPLITS[@]}"; do
        for language in "${LANGUAGES[@]}"; do
            source=$(find_text "$folder" "$(source_name "$split").$language")
            [[ -z $source ]] || digest "$source"
        done
    done
}

# is_known FILE NAME: is the text in FILE the published NAME?
is_known() { grep -qx "$(sha256 "$1")  $2" <<<"$CHECKSUMS"; }

# raw/ from local files. All six have to be found before any is read.
extract_local() {
    local split language name source missing="" unknown=""
    for split in "${SPLITS[@]}"; do
        for language in "${LANGUAGES[@]}"; do
            name=$(source_name "$split").$language
            [[ -n $(find_text "$folder" "$name") ]] || missing+=" $name"
        done
    done
    [[ -z $missing ]] || die "$folder lacks$missing (or the same with .gz): put them there or choose another --from"
    for split in "${SPLITS[@]}"; do
        for language in "${LANGUAGES[@]}"; do
            name=$(source_name "$split").$language
            source=$(find_text "$folder" "$name")
            extract "$source" "$build/raw/$split.$language"
            check_text "$build/raw/$split.$language" "$source"
            is_known "$build/raw/$split.$language" "$name" || unknown+=" $name"
        done
    done
    [[ -z $unknown ]] || warn "not the published Multi30k text, by its SHA-256:$unknown"
}

# raw/ from the repository.
extract_downloads() {
    local split language name source
    info "downloading from $url"
    begin_downloads "$url"
    for split in "${SPLITS[@]}"; do
        for language in "${LANGUAGES[@]}"; do
            name=$(source_name "$split").$language
            source=$out.download/$name.gz
            download "$source" "$url/$name.gz"
            extract "$source" "$build/raw/$split.$language"
            check_text "$build/raw/$split.$language" "$source"
            [[ -z $checksum ]] || is_known "$build/raw/$split.$language" "$name" ||
                reject "$source" "is not the text this script knows, by its SHA-256 (--no-checksum accepts it)"
        done
    done
}

check_pairs() {
    local split german english
    for split in "${SPLITS[@]}"; do
        german=$(count_lines "$build/raw/$split.de")
        english=$(count_lines "$build/raw/$split.en")
        ((german == english)) ||
            die "$split: $german lines of German and $english of English. They must be translations line by" \
                "line: get both files from the same place"
        ((german == $(known_pairs "$split"))) ||
            warn "$split: $german sentence pairs, the published Multi30k has $(known_pairs "$split")"
    done
}

learn_and_apply_bpe() {
    local model=$build/sentencepiece.bpe.model file
    info "learning a joint vocabulary of $vocab_size pieces"
    run "SentencePiece" "$PYTHON" "$scripts/sentencepiece_bpe.py" train --model "$model" \
        --vocab-size "$vocab_size" "$build/raw/train.de" "$build/raw/train.en"
    mkdir "$build/text"
    for file in "$build"/raw/*; do
        filter "SentencePiece" "$file" "$build/text/${file##*/}" \
            "$PYTHON" "$scripts/sentencepiece_bpe.py" encode --model "$model"
    done
}

main() {
    parse_options "$OPTIONS" "$@"
    [[ -n $target ]] || die "--out DIR is required; see --help"
    [[ -z $folder || -z $url ]] || die "--from and --url exclude each other; see --help"
    need_python
    need_module sentencepiece
    need_fairseq
    choose_source
    begin_output "$target" "recipe=multi30k
source=${folder:-$url}
vocab-size=$vocab_size" "$force"

    mkdir "$build/raw"
    if [[ -n $folder ]]; then extract_local; else extract_downloads; fi
    check_pairs
    learn_and_apply_bpe
    binarise --source-lang de --target-lang en --joined-dictionary \
        --trainpref text/train --validpref text/valid --testpref text/test --workers "$workers"
    finish_output
    info "done: $out (train with: fairseq-train $out/data-bin ...)"
}

main "$@"
