# Shared by the prepare_*.sh recipes: sourced, never run.
#
# A recipe finds its source, then works between two calls:
#
#     begin_output "$out" "$settings" "$force"   # exits 0 if OUT is there already, with these settings
#     ...                                        # everything is built in $build, a folder beside OUT
#     finish_output                              # $build becomes OUT, in one rename
#
# so OUT is complete or absent, whatever stops the recipe. OUT/.complete holds the settings and
# the list of files made; any other file belongs to the user and is never deleted.
#
# Messages go to the terminal as "WARNING: ..." and "ERROR: ..."; an error says what to do about it.

# shellcheck shell=bash

PYTHON=${PYTHON:-python}
STALL_SECONDS=${STALL_SECONDS:-60}       # a download that receives nothing for so long has failed
UNPACK_LIMIT=${UNPACK_LIMIT:-4294967296} # bytes that an archive may unpack to: a few KB can fill a disk

instead="--from FOLDER with files you already have" # of a download; a recipe may change it
out=        # where the result goes, absolute
build=      # where it is built: OUT.partial.XXXXXX
rebuilding= # not empty: OUT was there when we began, and --force replaces it
replaced=   # where the old OUT waits while --force puts the new one in its place
settings=   # key=value lines; two runs with the same settings give the same OUT
digests=    # lines "SHA-256 FILE" of the source, if it is local
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

# show_help SCRIPT: print its opening comment.
show_help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

help_files=("$0") # their opening comments are the text of --help

# parse_options TABLE ARGUMENT ...: set the variables in TABLE. Each of its lines is an option, its variable, and
#
#     text           the option takes a value
#     path           a file or folder, without ':', with which fairseq separates several
#     N              a whole number, N or more
#     one of A B …   one of these words
#     some of A B …  several of them, joined by ','; the variable gets them in this order ("": all)
#     =VALUE         the option takes no value; the variable gets VALUE
#
# With a line "--" the array "extra" gets what follows that word on the command line; with a line "*" it gets every
# argument that is not in the table.
parse_options() {
    local table=$1 option variable kind chosen
    shift
    while (($#)); do
        case $1 in
        --?*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --out=DIR is --out DIR
        --help | -h)
            for option in "${help_files[@]}"; do
                [[ $option == "${help_files[0]}" ]] || echo
                show_help "$option"
            done
            exit
            ;;
        esac
        if ! read -r option variable kind < <(awk -v option="$1" 'NF && $1 == option && $1 != "*"' <<<"$table"); then
            [[ $'\n'$table == *$'\n*'* ]] || die "unknown option '$1'; see --help"
            if [[ $1 == -- ]]; then
                extra+=("$@")
                return
            fi
            extra+=("$1")
            shift
            continue
        fi
        if [[ $option == -- ]]; then
            shift
            extra=("$@")
            return
        fi
        case $kind in
        =*) set -- "$option" "${kind#=}" "${@:2}" ;;
        text) need_value "$@" ;;
        path) need_path "$@" ;;
        "one of "* | "some of "*)
            need_value "$@"
            chosen=$(choice "$option" "$2" "${kind%% *}" "${kind#* of }") || exit 1
            set -- "$option" "$chosen" "${@:3}"
            ;;
        *) need_number "$option" "${2-}" "$kind" ;;
        esac
        printf -v "$variable" %s "$2"
        shift 2
    done
}

# need_value OPTION [VALUE ...]: stop unless a value follows the option.
need_value() {
    [[ $# -ge 2 && -n $2 ]] || die "$1 needs a value; see --help"
    [[ $2 != -* ]] || die "$1 needs a value, and '$2' is like an option; a file of this name is ./$2"
    [[ $2 != *[[:cntrl:]]* ]] || die "$1: a name with control characters, such as a new line, is asking for trouble"
}

need_path() {
    need_value "$@"
    [[ $2 != *:* ]] || die "$1 $2: fairseq takes ':' for what separates names; rename it, or give a link without ':'"
}

# need_number OPTION VALUE MINIMUM: stop unless VALUE is a whole number of at least MINIMUM.
need_number() {
    if ! [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3)); then
        die "$1 takes a whole number, $3 or more: got '$2'"
    fi
}

# choice OPTION VALUE one|some WORDS: VALUE if it is among WORDS; several are put in the order of WORDS, once each.
choice() {
    local word known found=() values
    if [[ $3 == some ]]; then IFS=, read -r -a values <<<"$2"; else values=("$2"); fi
    for word in "${values[@]}"; do
        [[ -n $word && " $4 " == *" $word "* ]] || die "$1: there is no '$word'; choose from: $4"
    done
    for known in $4; do
        [[ " ${values[*]} " != *" $known "* ]] || found+=("$known")
    done
    [[ $3 == one || ${found[*]} != "$4" ]] || return 0
    (IFS=,; echo "${found[*]}")
}

# need_checkpoints LIST: set the array "checkpoints" to the files of a list joined by ':'; stop if one is missing.
need_checkpoints() {
    local file
    [[ :$1: != *::* ]] || die "--checkpoint '$1' has an empty name: give files joined by ':'"
    IFS=: read -r -a checkpoints <<<"$1"
    for file in "${checkpoints[@]}"; do need_file "$file"; done
}

# need_file FILE: stop unless it can be read.
need_file() {
    [[ -e $1 ]] || die "$1: there is no such file"
    [[ -f $1 ]] || die "$1 is not a file"
    [[ -r $1 ]] || die "$1 cannot be read: check its permissions"
}

# make_folder FOLDER: with its parents; stop unless files can be made there.
make_folder() {
    local said
    said=$(mkdir -p -- "$1" 2>&1) || die "the folder $1 cannot be made: ${said##*: }"
    [[ -w $1 && -x $1 ]] || die "the folder $1 cannot be written to: choose another, or change its permissions"
}

# temporary OPTION: a new temporary file, or with -d a folder.
temporary() {
    mktemp "$@" 2>/dev/null || die "no temporary file can be made in ${TMPDIR:-/tmp}: set TMPDIR to a folder that is there"
}

# ---------------------------------------------------------------- what has to be installed

# need_tool COMMAND HOW: stop unless COMMAND can be run; HOW says how to get it.
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

# keep_memory COMMAND ...: run COMMAND so that it keeps the memory that a training step frees, for the next step.
# Returning it to the system each time takes a fourth of the time on a CPU (Multi30k: 1.25 updates a second; 1.7 with
# this). It sets a variable of the GNU C library, without effect elsewhere, unless the user has set it, even to "".
keep_memory() {
    GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1} \
        "$@"
}

# ---------------------------------------------------------------- files

# absolute_path PATH: without links and "..", whether or not it exists.
absolute_path() { "$PYTHON" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$1"; }

# rename FROM TO: one rename(2). Unlike mv, it never moves FROM into a folder TO:
# it replaces an empty TO; a full one is an error.
rename() { "$PYTHON" -c 'import os, sys; os.rename(*sys.argv[1:])' "$1" "$2"; }

# find_text FOLDER NAME ...: the path of the first NAME or NAME.gz in FOLDER; nothing if there is none.
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
    local free folder
    [[ -n $out ]] || return 0
    folder=$(dirname -- "$out")
    free=$(df -Pk -- "$folder" 2>/dev/null | awk 'NR == 2 { print $4 }') || return 0
    if [[ $free =~ ^[0-9]+$ ]] && ((free < 1024)); then
        printf '. The disk is full (%s kB are free in %s): make room and run the command again' "$free" "$folder"
    fi
}

# write_file FILE: from standard input, whole or not at all; several machines may do so at the same time.
write_file() {
    local part
    part=$(mktemp "$1.XXXXXX" 2>/dev/null) || die "$1 cannot be written: is its folder there, and yours?"
    if ! { cat >"$part" && chmod "$(new_mode 666)" "$part" && sync_file "$part" && mv -f "$part" "$1"; } 2>/dev/null; then
        rm -f "$part"
        die "$1 could not be written"
    fi
}

# new_mode MODE: octal, less the user's umask; mktemp makes files that only their owner can read.
new_mode() { printf '%o' $((0$1 & ~$(umask))); }

# sync_file FILE: flush it to the disk; all files, if this sync takes no argument.
sync_file() { sync "$1" 2>/dev/null || sync; }

# lock FILE [shared]: stop if another process holds it. Ours ends with this script and its children. Several processes
# can hold a shared one.
lock() {
    # tied to an open file, so that no kill leaves it behind
    exec 9>>"$1" || die "$1 cannot be written"
    "$PYTHON" -c '
import fcntl, sys

try:
    fcntl.flock(9, (fcntl.LOCK_SH if sys.argv[1:] else fcntl.LOCK_EX) | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(1)
except OSError:
    pass  # a file system without locks
' "${@:2}" || die "another command is at work in $(dirname -- "$1"): wait for it, or choose another --out"
}

# last_line LOG: the last line that is not empty.
last_line() { LC_ALL=C awk 'NF { line = $0 } END { print substr(line, 1, 500) }' "$1"; }

# why_it_failed LOG DATA_BIN CHECKPOINTS [SPLIT]: one line for an error message: what is wrong with the files given to a
# fairseq command (checkpoints joined by ':'), or else its last output.
why_it_failed() {
    local said
    said=$("$PYTHON" "$(dirname "${BASH_SOURCE[0]}")/check_model.py" --data "$2" ${4:+--split "$4"} "--checkpoint=$3" 2>&1 |
        sed -n 's/^ERROR: //p' | tail -n 1) || true
    printf '%s' "${said:-$(last_line "$1")}"
}

# count_lines FILE: like fairseq and unlike wc -l, counts a last line without newline.
count_lines() { awk 'END { print NR }' "$1"; }

# count_sentences DATA_BIN SPLIT: from the header of fairseq-preprocess's index; stop if there is none.
count_sentences() {
    local index
    index=$(find "$1/" -maxdepth 1 -name "$2.*.idx" | LC_ALL=C sort | head -n 1)
    [[ -n $index ]] || die "$1 has no split '$2': make it with a prepare script"
    "$PYTHON" -c '
import struct, sys

with open(sys.argv[1], "rb") as file:
    head = file.read(26)
if len(head) < 26 or head[:9] != b"MMIDIDX\0\0":
    sys.exit(1)
print(struct.unpack("<Q", head[18:])[0])
' "$index" || die "$index is damaged: prepare the data again"
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi <"$1" | cut -d ' ' -f 1
}

# extract SOURCE FILE: copy SOURCE to FILE, uncompressed if its name ends in .gz.
extract() {
    local said
    need_file "$1"
    case $1 in
    *.gz)
        check_gzip "$1" "$1"
        said=$({ gzip -dc "$1" >"$2"; } 2>&1) || die "could not unpack $1: ${said##*: }"
        ;;
    *) said=$(cp "$1" "$2" 2>&1) || die "could not copy $1: ${said##*: }" ;;
    esac
}

# ---------------------------------------------------------------- is the source fit for use?
# Each check takes the file and, if it was unpacked from one, its source for the message.

# reject SOURCE REASON: stop, without keeping a bad download for the next run.
reject() {
    if [[ $1 == "$out.download/"* ]]; then
        rm -f "$1"
        die "${1##*/}, as downloaded, $2. Run the command again to fetch it anew, or use $instead"
    fi
    die "$1 $2. Put a good copy in its place and run the command again"
}

is_web_page() { head -c 512 "$1" | LC_ALL=C grep -aiE '<!doctype html|<html' >/dev/null; }

# unpack ARCHIVE FOLDER NAME ...: copy the files called NAME, in any folder of a tar or zip, to FOLDER.
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

# check_text FILE SOURCE [NAME]: NAME is FILE's name in an archive SOURCE.
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
    ((status == 0)) || failed "$name" "$log" "$status"
}

# filter NAME FILE RESULT COMMAND ...: run COMMAND from FILE to RESULT.
filter() {
    local name=$1 file=$2 result=$3 log=$build/run.log
    shift 3
    "$@" <"$file" >"$result" 2>"$log" || failed "$name" "$log" $?
}

# failed NAME LOG STATUS: say why, and stop.
failed() {
    local name=$1 log=$2 status=$3
    if [[ $(last_line "$log") == "ERROR: "* ]]; then # one of ours: nothing to add
        die "$name failed: $(last_line "$log" | cut -d ' ' -f 2-)"
    fi
    tail -n 15 "$log" >&2
    die "$name failed (exit status $status); its last lines are above"
}

# run_with_progress NAME COMMAND ...: the same, but a terminal shows COMMAND's standard error.
run_with_progress() {
    if [[ -t 2 ]]; then
        run "$1" with_shown_errors "${@:2}" 3>&2
    else
        run "$@"
    fi
}

with_shown_errors() { exec "$@" 2>&3; }

# binarise OPTION ...: fairseq-preprocess from $build/text to $build/data-bin; prints its counts.
binarise() {
    info "binarising"
    run fairseq-preprocess preprocess_in_build --destdir data-bin "$@"
    sed -n 's/^\[.*\] \(text.* sents, .*\)/  \1/p' "$build/data-bin/preprocess.log"
}

# Relative paths, so that no path of this machine ends up in data-bin/preprocess.log.
preprocess_in_build() { cd "$build" && exec fairseq-preprocess "$@"; }

stop_child() {
    [[ -n $child ]] || return 0
    # A download shares our process group; then only that process has to be stopped.
    kill -- "-$child" 2>/dev/null || kill "$child" 2>/dev/null || true
    wait "$child" 2>/dev/null || true
    child=
}

cleanup() {
    local status=$? hint
    stop_child
    # If set -e stopped the recipe, the failed command has shown its own message; only add that the disk is full.
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
    make_folder "$(dirname -- "$out")"
    for left in "$out".partial.*; do
        [[ ! -e $left ]] || warn "$left is there: from a run that is not over, or was killed; then remove it"
    done
    trap cleanup EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # A unique name: process numbers are not unique if several machines or containers share a disk.
    build=$(mktemp -d "$out.partial.XXXXXX" 2>/dev/null) || die "no folder can be made beside $out"
    chmod "$(new_mode 777)" "$build"
}

# check_existing FORCE: exit 0 if OUT has these settings, return if it may be replaced, else stop.
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
        rebuilding=yes
        return 0
    fi
    there=$(LC_ALL=C grep -avE '^(file|size|digest) ' "$marker" | LC_ALL=C sort) || true
    asked=$(LC_ALL=C sort <<<"$settings")
    if [[ -z $there || -z $(manifest) ]]; then
        die "$marker is damaged, so nobody knows what $out holds: remove the folder, or choose another --out"
    fi
    [[ $there == "$asked" ]] || die "$out was prepared with other settings" \
        "(there: $(only_in_first "$there" "$asked"); asked for: $(only_in_first "$asked" "$there"))." \
        "Choose another --out, remove the folder, or rebuild it with --force"
    other=$(LC_ALL=C comm -23 <(manifest) <(list_files "$out"))
    [[ -z $other ]] || die "files are missing from $out; rebuild it with --force:"$'\n'"$other"
    other=$(only_in_first "$(sed -n 's/^size //p' "$marker" | LC_ALL=C sort)" "$(sizes "$out" | LC_ALL=C sort)")
    [[ -z $other ]] || die "files in $out are not as they were made (bytes, file: $other); rebuild it with --force"
    other=$(only_in_first "$(LC_ALL=C sort <<<"$digests")" "$(sed -n 's/^digest //p' "$marker" | LC_ALL=C sort)")
    [[ -z $other ]] || ! grep -q '^digest ' "$marker" || die "the source has changed since $out was made (SHA-256, file: $other):" \
        "rebuild it with --force, or choose another --out"
    info "already prepared: $out"
    exit 0
}

# only_in_first LINES LINES: the first's lines that the second lacks, on one line.
only_in_first() { LC_ALL=C comm -23 <(echo "$1") <(echo "$2") | paste -s -d ' ' -; }

# list_files FOLDER: the files in it, sorted, without the marker.
list_files() { (cd "$1" && find . ! -type d ! -path ./.complete | LC_ALL=C sort); }

# sizes FOLDER: its files, as "BYTES ./path".
sizes() {
    local file
    list_files "$1" | while read -r file; do printf '%s %s\n' $(($(wc -c <"$1/$file"))) "$file"; done
}

# digest FILE ...: add the source of OUT to $digests, before begin_output.
digest() {
    local file sum
    for file in "$@"; do
        need_file "$file"
        sum=$(sha256 "$file" 2>/dev/null) || die "$file cannot be read: check its permissions, and the disk"
        digests+="$sum ${file##*/}"$'\n'
    done
}

# The files that were made, as the marker in OUT lists them.
manifest() { sed -n 's/^file //p' "$out/.complete"; }

finish_output() {
    rm -f "$build/run.log"
    {
        printf '%s\n' "$settings"
        list_files "$build" | sed 's/^/file /'
        sizes "$build" | sed 's/^/size /'
        printf '%s' "$digests" | sed 's/^/digest /'
    } >"$build/.complete"
    find "$build" -type f -exec sync {} + 2>/dev/null || sync
    if [[ -n $rebuilding ]]; then
        replaced=$build.replaced
        rename "$out" "$replaced"
    fi
    if ! rename "$build" "$out" 2>/dev/null; then
        [[ -z $replaced && -f $out/.complete ]] || die "could not move the finished folder to $out: is another run at it?"
        (check_existing "") || exit 1 # meanwhile another run has made the same
        exit 0
    fi
    if [[ -n $replaced ]]; then
        rm -rf "$replaced"
    fi
    if [[ -f $out.download/url ]]; then
        rm -rf "$out.download"
    fi
}

# ---------------------------------------------------------------- downloads
# They stay in OUT.download until OUT is finished, so that an interrupted run need not start over.

# begin_downloads SOURCE: SOURCE is one address or several; stop if OUT.download has files from elsewhere.
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

# download FILE URL ...: fetch FILE from the first URL that has it. FILE.partN keeps what the N-th has sent, and this or
# a later run resumes from it.
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

# choose_archive DEFAULT ENVIRONMENT: choose the source of a recipe's archive: $archive, a local file, or $url, one
# address or several separated by blanks. So are the arguments.
choose_archive() {
    [[ -z $archive || -z $url ]] || die "--archive and --url exclude each other; see --help"
    if [[ -n $archive ]]; then
        [[ -e $archive ]] || die "--archive $archive: there is no such file"
        archive=$(absolute_path "$archive")
        digest "$archive"
    else
        url=${url:-${2:-$1}}
    fi
}

# fetch_archive NAME: download the archive from $url, unless $archive is given; set $archive to its path.
fetch_archive() {
    local urls
    [[ -z $archive ]] || return 0
    read -r -a urls <<<"$url"
    info "downloading from ${urls[0]}"
    begin_downloads "$url"
    archive=$out.download/$1
    download "$archive" "${urls[@]}"
}

# fetch_resuming URL FILE: fetch; start over if the server refuses to resume where FILE ends.
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

# fetch URL FILE: returns 2 if the server refused the request (perhaps only to resume FILE).
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
