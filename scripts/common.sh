# Shared by the prepare_*.sh recipes: sourced, never run.
#
# A recipe finds its source, then works between two calls:
#
#     begin_output "$out" "$settings" "$force"   # exits 0 if OUT is there already, with these settings
#     ...                                        # everything is built in $build, a folder beside OUT
#     finish_output                              # $build becomes OUT, in one rename
#
# so OUT is complete or absent, whatever stops the recipe. OUT/.complete holds the settings and
# the list of files made: what is not on that list belongs to the user and is never deleted.
#
# Messages go to the terminal as "WARNING: ..." and "ERROR: ..."; an error says what to do about it.

# shellcheck shell=bash

PYTHON=${PYTHON:-python}
STALL_SECONDS=${STALL_SECONDS:-60}       # a download that brings nothing for so long has failed
UNPACK_LIMIT=${UNPACK_LIMIT:-4294967296} # bytes that an archive may unpack to: a few KB can hold a full disk

instead="--from FOLDER with files you already have" # of a download; a recipe may say otherwise
out=        # where the result goes, absolute
build=      # where it is built: OUT.partial.PID
replaced=   # where the old OUT waits while --force puts the new one in its place
settings=   # key=value lines; two runs with the same settings give the same OUT
child=      # the running command that a signal has to stop
explained=  # not empty: an error message has been shown

# ---------------------------------------------------------------- messages and options

info() { printf '%s\n' "$*"; }
warn() { printf 'WARNING: %s\n' "$*" >&2; }
die() {
    printf 'ERROR: %s\n' "$*$(full_disk)" >&2
    explained=yes
    exit 1
}

# show_help SCRIPT: print the comment that opens it.
show_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# parse_options TABLE ARGUMENT ...: set the variables that TABLE names. A line of it is an option, its variable, and
#
#     text      the option takes a value, which must not be empty
#     N         it takes a whole number, N or more
#     =VALUE    it takes none, and sets the variable to VALUE
#
# With a line "--" the array "extra" gets what follows that word on the command line.
parse_options() {
    local table=$1 option variable kind
    shift
    while (($#)); do
        case $1 in
        --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --out=DIR is --out DIR
        --help | -h) show_help "$0"; exit ;;
        esac
        read -r option variable kind < <(awk -v option="$1" 'NF && $1 == option' <<<"$table") ||
            die "unknown option '$1'; see --help"
        if [[ $option == -- ]]; then
            shift
            # shellcheck disable=SC2034 # for the caller
            extra=("$@")
            return
        fi
        case $kind in
        =*) set -- "$option" "${kind#=}" "${@:2}" ;;
        text) need_value "$@" ;;
        *) need_number "$option" "${2-}" "$kind" ;;
        esac
        printf -v "$variable" %s "$2"
        shift 2
    done
}

# need_value OPTION [VALUE ...]: stop unless a value follows the option.
need_value() { [[ $# -ge 2 && -n $2 && $2 != --* ]] || die "$1 needs a value; see --help"; }

# need_number OPTION VALUE MINIMUM: stop unless VALUE is a whole number, at least MINIMUM.
need_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        die "$1 takes a whole number, $3 or more: got '$2'"
    fi
}

# ---------------------------------------------------------------- what has to be installed

# need_tool COMMAND HOW: stop unless COMMAND can be run; HOW says where it comes from.
need_tool() { command -v "$1" >/dev/null || die "the command '$1' was not found: $2"; }

need_python() {
    need_tool "$PYTHON" "activate your Python environment, or set PYTHON=/path/to/python"
}

need_module() {
    "$PYTHON" -c "import $1" 2>/dev/null ||
        die "the Python module '$1' cannot be imported: $PYTHON -m pip install $1"
}

need_fairseq() {
    need_tool fairseq-preprocess \
        "activate the environment that holds fairseq, or install it: $PYTHON -m pip install ve-fairseq"
}

# keep_memory COMMAND ...: run COMMAND so that memory which a training step frees stays with it, for the next step. To
# give it back to the system and ask for it again takes a fourth of the time on a CPU (Multi30k: 1.25 updates a second,
# and 1.7 so). A variable of the GNU C library, of no effect elsewhere; who sets it, if to nothing, is not overruled.
keep_memory() {
    GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1} \
        "$@"
}

# ---------------------------------------------------------------- files

# absolute_path PATH: without links and "..", whether or not it exists.
absolute_path() { "$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$1"; }

# rename FROM TO: one rename(2). Unlike mv, it never moves FROM into a folder TO:
# an empty TO is replaced, a full one is an error.
rename() { "$PYTHON" -c 'import os, sys; os.rename(*sys.argv[1:])' "$1" "$2"; }

# find_text FOLDER NAME ...: the path of the first NAME or NAME.gz in FOLDER, nothing if there is none.
find_text() {
    local folder=$1 name file
    shift
    for name in "$@"; do
        for file in "$folder/$name" "$folder/$name.gz"; do
            [[ -f $file ]] || continue
            printf '%s\n' "$file"
            return
        done
    done
}

# detokenise: move punctuation back to the word before it, from stdin to stdout.
detokenise() { sed 's/ \([.,?!]\)/\1/g'; }

# full_disk: a sentence for an error message if the disk of OUT is full (less than 1 MB is free), else nothing.
full_disk() {
    local free
    [[ -n $out ]] || return 0
    free=$(df -Pk "$(dirname "$out")" 2>/dev/null | awk 'NR == 2 { print $4 }') || return 0
    if [[ $free =~ ^[0-9]+$ ]] && ((free < 1024)); then
        printf '. The disk is full (%s kB are free in %s): make room and run the command again' "$free" "$(dirname "$out")"
    fi
}

# count_lines FILE: counts a last line without newline, as fairseq does and wc -l does not.
count_lines() { awk 'END { print NR }' "$1"; }

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi <"$1" | cut -d ' ' -f 1
}

# extract SOURCE FILE: copy SOURCE to FILE, uncompressed if its name ends in .gz.
extract() {
    case $1 in
    *.gz)
        check_gzip "$1" "$1"
        gzip -dc "$1" >"$2"
        ;;
    *) cp "$1" "$2" ;;
    esac
}

# ---------------------------------------------------------------- is the source fit for use?
# Each check takes the file to look at; where it was unpacked from one, also its source, which the message names.

# reject SOURCE REASON: stop; a download that is no good is not kept for the next run.
reject() {
    if [[ $1 == "$out.download/"* ]]; then
        rm -f "$1"
        die "${1##*/}, as downloaded, $2. Run the command again to fetch it anew, or use $instead"
    fi
    die "$1 $2. Put a good copy in its place and run the command again"
}

is_web_page() { head -c 512 "$1" | LC_ALL=C grep -aiE '<!doctype html|<html' >/dev/null; }

# unpack ARCHIVE FOLDER NAME ...: copy the files called NAME, in whatever folder of a tar or zip, to FOLDER.
unpack() {
    local archive=$1 status=0
    info "unpacking ${archive##*/}"
    if is_web_page "$archive"; then
        reject "$archive" "is a web page, not an archive"
    fi
    supervise "$build/run.log" "$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/unpack.py" \
        --most-bytes "$UNPACK_LIMIT" "$@" || status=$?
    case $status in
    0) ;;
    1) reject "$archive" "$(tail -n 1 "$build/run.log")" ;;
    *) die "could not unpack $archive: $(tail -n 1 "$build/run.log")" ;;
    esac
}

check_gzip() {
    local size
    if is_web_page "$1"; then
        reject "$2" "is a web page, not a gzip file"
    fi
    size=$({ gzip -dc "$1" 2>/dev/null || true; } | head -c $((UNPACK_LIMIT + 1)) | wc -c)
    ((size <= UNPACK_LIMIT)) || reject "$2" "unpacks to more than $UNPACK_LIMIT bytes"
    gzip -t "$1" 2>/dev/null || reject "$2" "is corrupt or cut short (gzip -t fails)"
}

# The number of the first line that is not UTF-8; nothing if all are.
first_invalid_line() {
    "$PYTHON" -c '
import sys

with open(sys.argv[1], "rb") as file:
    for number, line in enumerate(file, start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            print(number)
            break
' "$1"
}

# check_text FILE SOURCE [NAME]: NAME is what FILE is called in an archive SOURCE.
check_text() {
    local line what=${3:+"has a $3 that "}
    if is_web_page "$1"; then
        reject "$2" "${what}is a web page, not text"
    fi
    LC_ALL=C grep -aq '[^[:space:]]' "$1" || reject "$2" "${what}is empty"
    line=$(first_invalid_line "$1")
    [[ -z $line ]] || reject "$2" "${what}is not UTF-8 (the first bad line is number $line)"
}

# ---------------------------------------------------------------- long commands and interruption

# supervise LOG COMMAND ...: run COMMAND, its output in LOG, and return its exit status. It gets its own process group, so
# that a signal to the recipe stops it at once, worker processes included.
supervise() {
    local log=$1 status=0
    shift
    set -m
    "$@" </dev/null >"$log" 2>&1 &
    child=$!
    set +m
    wait "$child" || status=$?
    child=
    return "$status"
}

# run NAME COMMAND ...: run COMMAND with its output in a log, shown only if it fails.
run() {
    local name=$1 log=$build/run.log status=0
    shift
    supervise "$log" "$@" || status=$?
    if ((status)); then
        tail -n 15 "$log" >&2
        die "$name failed (exit status $status); its last lines are above"
    fi
}

# run_with_progress NAME COMMAND ...: the same, but the terminal, if there is one, shows COMMAND's standard error.
run_with_progress() {
    if [[ -t 2 ]]; then
        run "$1" with_shown_errors "${@:2}" 3>&2
    else
        run "$@"
    fi
}

with_shown_errors() { exec "$@" 2>&3; }

# binarise OPTION ...: fairseq-preprocess from $build/text to $build/data-bin; prints what it counted.
binarise() {
    info "binarising"
    run fairseq-preprocess preprocess_in_build --destdir data-bin "$@"
    sed -n 's/^\[.*\] \(text.* sents, .*\)/  \1/p' "$build/data-bin/preprocess.log"
}

# Relative paths, so that no path of this machine ends up in data-bin/preprocess.log.
preprocess_in_build() { cd "$build" && exec fairseq-preprocess "$@"; }

stop_child() {
    [[ -n $child ]] || return 0
    # A download shares our process group: then there is only the one process to stop.
    kill -- "-$child" 2>/dev/null || kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
    child=
}

cleanup() {
    local status=$? hint
    stop_child
    # A command that failed has shown its own message, where set -e stopped the recipe; a full disk is worth saying.
    if ((status > 0 && status < 128)) && [[ -z $explained ]]; then
        hint=$(full_disk)
        [[ -z $hint ]] || printf 'ERROR: stopped by the error above%s\n' "$hint" >&2
    fi
    if [[ -n $replaced && -d $replaced && ! -e $out ]]; then
        rename "$replaced" "$out"
    fi
    if [[ -n $build ]]; then
        rm -rf "$build"
    fi
}

# ---------------------------------------------------------------- the output folder

# begin_output OUT SETTINGS FORCE: see the top of this file. FORCE is empty or "yes".
begin_output() {
    local left
    out=$(absolute_path "$1")
    settings=$2
    if [[ -e $out ]]; then
        check_existing "$3"
    fi
    mkdir -p "$(dirname "$out")"
    for left in "$out".partial.*; do
        [[ ! -e $left ]] || warn "$left is there: from a run that is not over, or was killed; then remove it"
    done
    build=$out.partial.$$
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    mkdir "$build"
}

# check_existing FORCE: exit 0 if OUT is what was asked for, return if it may be replaced, else stop.
check_existing() {
    local marker=$out/.complete there asked other
    [[ -d $out ]] || die "$out is not a folder: choose another --out"
    [[ -n $(ls -A "$out") ]] || return 0
    [[ -f $marker ]] || die "$out is not empty and was not made by this script: choose another --out" \
        "(nothing in it was touched)"
    if [[ $1 == yes ]]; then
        other=$(LC_ALL=C comm -13 <(manifest) <(list_files "$out"))
        [[ -z $other ]] || die "--force would delete files in $out that this script did not make;" \
            "move them or choose another --out:"$'\n'"$other"
        return 0
    fi
    there=$(grep -v '^file ' "$marker" | LC_ALL=C sort)
    asked=$(LC_ALL=C sort <<<"$settings")
    [[ $there == "$asked" ]] || die "$out was prepared with other settings" \
        "(there: $(only_in_first "$there" "$asked"); asked for: $(only_in_first "$asked" "$there"))." \
        "Choose another --out, remove the folder, or rebuild it with --force"
    other=$(LC_ALL=C comm -23 <(manifest) <(list_files "$out"))
    [[ -z $other ]] || die "files are missing from $out; rebuild it with --force:"$'\n'"$other"
    info "already prepared: $out"
    exit 0
}

# only_in_first LINES LINES: what the second does not have, on one line.
only_in_first() { LC_ALL=C comm -23 <(echo "$1") <(echo "$2") | paste -s -d ' ' -; }

# list_files FOLDER: the files in it, sorted, without the marker.
list_files() { (cd "$1" && find . ! -type d ! -path ./.complete | LC_ALL=C sort); }

# The files that were made, as the marker in OUT lists them.
manifest() { sed -n 's/^file //p' "$out/.complete"; }

finish_output() {
    rm -f "$build/run.log"
    {
        printf '%s\n' "$settings"
        list_files "$build" | sed 's/^/file /'
    } >"$build/.complete"
    if [[ -f $out/.complete ]]; then
        replaced=$build.replaced
        rename "$out" "$replaced"
    fi
    rename "$build" "$out" || die "could not move the finished folder to $out: is another run writing there?"
    if [[ -n $replaced ]]; then
        rm -rf "$replaced"
    fi
    if [[ -f $out.download/url ]]; then
        rm -rf "$out.download"
    fi
}

# ---------------------------------------------------------------- downloads
# They wait in OUT.download until OUT is finished, so that an interrupted run need not start over.

# begin_downloads SOURCE: SOURCE, an address or several, says where all of them come from; files from elsewhere are not
# mixed in.
begin_downloads() {
    local folder=$out.download
    command -v curl >/dev/null || command -v wget >/dev/null ||
        die "neither curl nor wget was found: install one of them (for example: apt-get install curl), or use $instead"
    if [[ -e $folder && "$(cat "$folder/url" 2>/dev/null)" != "$1" ]]; then
        die "$folder is in the way: it does not hold downloads from $1. Remove it or choose another --out"
    fi
    mkdir -p "$folder"
    printf '%s\n' "$1" >"$folder/url"
}

# download FILE URL ...: fetch FILE from the first URL that has it. What the N-th has sent waits in FILE.partN, where
# this or a later run resumes.
download() {
    local file=$1 url part number=0 all
    shift
    all=$*
    [[ ! -f $file ]] || return 0
    for url in "$@"; do
        number=$((number + 1))
        part=$file.part$number
        if fetch_resuming "$url" "$part"; then
            mv "$part" "$file"
            return
        fi
        ((number == $#)) || warn "could not download $url: trying the next address"
    done
    die "could not download ${file##*/} from ${all// / or }. Run the command again to resume, or use $instead"
}

# choose_archive DEFAULT ENVIRONMENT: settle where a recipe's one archive comes from: $archive, a file that is there
# already, or $url, one address or several with blanks between, as the arguments are.
choose_archive() {
    [[ -z $archive || -z $url ]] || die "--archive and --url exclude each other; see --help"
    if [[ -n $archive ]]; then
        [[ -f $archive ]] || die "--archive $archive: there is no such file"
        archive=$(absolute_path "$archive")
    else
        url=${url:-${2:-$1}}
    fi
}

# fetch_archive NAME: download the archive from $url, unless $archive is there already; then $archive is its path.
fetch_archive() {
    local urls
    [[ -z $archive ]] || return 0
    read -r -a urls <<<"$url"
    info "downloading from ${urls[0]}"
    begin_downloads "$url"
    archive=$out.download/$1
    download "$archive" "${urls[@]}"
}

# fetch_resuming URL FILE: fetch, from the start if the server refuses to go on where FILE ends.
fetch_resuming() {
    local status=0
    fetch "$1" "$2" || status=$?
    if ((status == 2)) && [[ -s $2 ]]; then
        warn "$1 could not be resumed: starting over"
        rm -f "$2"
        status=0
        fetch "$1" "$2" || status=$?
    fi
    return "$status"
}

# fetch URL FILE: returns 2 if the server refused the request (perhaps only the resuming of FILE).
fetch() {
    local status=0
    if command -v curl >/dev/null; then
        fetch_with_curl "$@" &
    else
        fetch_with_wget "$@" &
    fi
    child=$!
    wait "$child" || status=$?
    child=
    case $status in
    8 | 22 | 33 | 36) return 2 ;; # wget: server error; curl: HTTP error, no ranges, bad resume
    *) return "$status" ;;
    esac
}

fetch_with_curl() {
    local options=(--fail --location --retry 2 --connect-timeout 30
        --speed-time "$STALL_SECONDS" --speed-limit 1)
    if [[ -t 2 ]]; then options+=(--progress-bar); else options+=(--silent --show-error); fi
    exec curl "${options[@]}" --continue-at - --output "$2" "$1"
}

fetch_with_wget() {
    local options=(--tries 3 --timeout "$STALL_SECONDS")
    if [[ -t 2 ]]; then options+=(--quiet --show-progress); else options+=(--no-verbose); fi
    exec wget "${options[@]}" --continue --output-document "$2" "$1"
}
