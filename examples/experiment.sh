# Shared by examples/*/run.sh: sourced, never run.
# The options of every examples/*/run.sh:
#
#   --mapping NAME         of attention: multimax, softmax, sparsemax, entmax15, entmax, evsoftmax (default: multimax),
#                          or stock: fairseq's own architecture
#   --sites LIST           where it applies: encoder, decoder, cross; softmax elsewhere (default: everywhere)
#   --output-mapping NAME  of the vocabulary: softmax, multimax, or, trained with --criterion entmax_loss, sparsemax,
#                          entmax15, entmax (default: softmax)
#   --order N              of MultiMax's modulator: 1 or 2 (default: 2)
#   --terms LIST           the sides that it learns: below,above or one of them (default: both)
#   --init NAME            how it starts: normal, identity or shaped (default: normal)
#   --lr-scale X           the learning rate of its numbers, as a multiple of the others' (default: 1)
#   --scale NAME           a factor of the scores before the mapping: none, learned, log-length (default: none)
#   --entmax-alpha A       α of entmax: a number in (1, 2], or learned (default: 1.5)
#   --seed N               (default: 1)
#   --epochs N             how long to train, instead of the recipe's setting
#   --updates N            the same, in updates
#   --precision NAME       fp32, fp16 or bf16
#   --average N            keep the last N epochs, and score their average, too (0: neither; default: the recipe's)
#   --data DIR             made by the prepare script, which is run if DIR has no data-bin (default: data/EXPERIMENT)
#   --archive FILE         of the data of IWSLT'14 and WikiText-103: taken instead of a download
#   --from DIR             a folder with those of Multi30k or Brown, likewise
#   --runs DIR             for checkpoints, logs and scores, one folder per run (default: runs/EXPERIMENT), or
#   --out DIR              the folder of this run (default: MAPPING-seedN, with other choices in the name, in --runs)
#   --only STAGE           only prepare, train or evaluate (default: those of the three that are not done yet)
#   --processes N          train on N GPUs; an update sees as many tokens as with one (default: 1)
#   --launch COMMAND       starts the processes instead of fairseq-train itself: "torchrun --nproc-per-node 4"
#   --cpu-smoke            the whole path with a tiny model on made-up data: a minute or so on a CPU
#   --dry-run              print the command that trains, and do nothing
#   -- OPTION ...          further options of fairseq-train
#   --help                 show this text
#
# Run it again with the same options and it resumes where it was stopped; when all is done it says so. The run's folder
# has the scores and all settings in run.json. `python scripts/results_table.py runs` makes tables of the runs below
# runs/.

# shellcheck shell=bash

# A run.sh is a recipe: it sets the variables below, and defines how its data are made and its model is scored. Then
# `run_experiment "$@"` does what all experiments share.

examples=$(cd "$(dirname "${BASH_SOURCE[0]}")" >/dev/null && pwd)
root=$(dirname "$examples")
scripts=$root/scripts
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"
help_files+=("$examples/experiment.sh")

# ---------------------------------------------------------------- what a recipe sets

experiment=       # the name of its folder
prepare_script=   # of scripts/: makes $data, with
prepare_options=()
source_option=    # of that script: where the data are, --archive or --from
arch=             # fairseq's architecture, with the prefix "multimax_" unless --mapping stock
model=()          # its dimensions, if not the architecture's own
training=()       # task, loss, optimiser, batches: settings that do not depend on the command line
sparsemax=()      # after training, where attention is sparsemax, or
entmax=()         # 1.5- or α-entmax
max_tokens=       # in a batch, and
update_freq=1     # batches in an update, for one process
length=()         # --max-update N or --max-epoch N
precision=fp32
average=0         # number of epochs to keep, and to average for scoring
smoke_model=()    # with --cpu-smoke, instead of model,
smoke_length=()   # instead of length,
smoke_training=() # and after training

# For smoke_model of a translation model: a layer of width 32; the path is the same.
# shellcheck disable=SC2034 # for the recipes
tiny_transformer=(
    --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2
    --decoder-layers 1 --decoder-embed-dim 32 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2
)

# Of a language model.
# shellcheck disable=SC2034
tiny_lm=(
    --decoder-layers 1 --decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32
    --decoder-ffn-embed-dim 32 --decoder-attention-heads 2 --share-decoder-input-output-embed --dropout 0.1
)

# And two functions:
#   prepare_smoke PATH    make $data, small, from what scripts/make_smoke_data.py writes to PATH
#   evaluate              write scores beside $run/checkpoint_best.pt, for scripts/record_run.py to collect

# ---------------------------------------------------------------- what the command line sets

mapping=multimax
sites=
output_mapping=softmax
order=2
terms=
init=normal
lr_scale=1
scale=none
entmax_alpha=1.5
seed=1
epochs=  # instead of length, or
updates=
archive= # of the data, or
from=
data=
runs=
run= # --out
only=
processes=1
launch= # words
smoke=
dry_run=
extra=()

# The choices are those of multimax_fairseq, which would check them only after the data are prepared.
parse_run_options() {
    parse_options "
--mapping         mapping         one of softmax multimax sparsemax entmax15 entmax evsoftmax stock
--sites           sites           some of encoder decoder cross
--output-mapping  output_mapping  one of softmax multimax sparsemax entmax15 entmax
--order           order           one of 1 2
--terms           terms           some of below above
--init            init            one of normal identity shaped
--lr-scale        lr_scale        text
--scale           scale           one of none learned log-length
--entmax-alpha    entmax_alpha    text
--seed            seed            1
--epochs          epochs          1
--updates         updates         1
--precision       precision       one of fp32 fp16 bf16
--average         average         0
--data            data            path
--archive         archive         text
--from            from            text
--runs            runs            path
--out             run             path
--only            only            one of prepare train evaluate
--processes       processes       1
--launch          launch          text
--cpu-smoke       smoke           =yes
--dry-run         dry_run         =yes
--
" "$@"
    [[ $lr_scale =~ ^[0-9]*\.?[0-9]+$ && ! $lr_scale =~ ^[0.]*$ ]] ||
        die "--lr-scale takes a number above 0, such as 10: got '$lr_scale'"
    [[ $entmax_alpha =~ ^(learned|1\.[0-9]*[1-9][0-9]*|2(\.0+)?)$ ]] ||
        die "--entmax-alpha takes a number in (1, 2] or 'learned': got '$entmax_alpha'"
    [[ -z $epochs || -z $updates ]] || die "--epochs and --updates exclude each other; see --help"
    [[ -z $archive || $source_option == --archive ]] || die "--archive: $experiment takes --from DIR instead"
    [[ -z $from || $source_option == --from ]] || die "--from: $experiment takes --archive FILE instead"
    if [[ -n $epochs$updates ]]; then
        length=(${epochs:+--max-epoch "$epochs"} ${updates:+--max-update "$updates"})
        smoke_length=("${length[@]}")
        [[ -z $epochs || -n $smoke || " ${training[*]} " != *" --lr-scheduler cosine "* ]] ||
            die "--epochs: here the learning rate falls to 0 over the updates; say how many with --updates"
    fi
}

# sort_extra: options of fairseq-train that only say on which machines it runs go to placement, the others to choices.
sort_extra() {
    local word list=choices
    placement=() choices=()
    for word in ${extra[@]+"${extra[@]}"}; do
        case $word in
            --distributed-world-size*) list=choices ;; # it changes the tokens in an update
            --distributed-*) list=placement ;;
            -[!0-9]*) list=choices ;;
        esac
        if [[ $list == placement ]]; then placement+=("$word"); else choices+=("$word"); fi
    done
}

# ---------------------------------------------------------------- the command that trains

# run_name: a name distinct from other runs', such as multimax-order1-below-seed1.
run_name() {
    local name=$mapping
    [[ -z $sites ]] || name+=-${sites//,/+}
    [[ $output_mapping == softmax ]] || name+=-output_$output_mapping
    [[ $order == 2 ]] || name+=-order$order
    [[ -z $terms ]] || name+=-${terms//,/+}
    [[ $init == normal ]] || name+=-$init
    [[ $lr_scale == 1 ]] || name+=-lr$lr_scale
    [[ $scale == none ]] || name+=-scale_$scale
    [[ $entmax_alpha == 1.5 ]] || name+=-alpha_$entmax_alpha
    echo "$name-seed$seed"
}

mapping_options() {
    if [[ $mapping == stock ]]; then
        [[ -z $sites$terms && "$output_mapping $order $init $lr_scale $scale $entmax_alpha" == \
            "softmax 2 normal 1 none 1.5" ]] ||
            die "--mapping stock is fairseq's own model: it has no --sites, --scale, --output-mapping, no modulator and no α"
        options=(--arch "$arch")
        return
    fi
    options=(--arch "multimax_$arch" --attention-mapping "$mapping" --output-mapping "$output_mapping"
        --multimax-order "$order" --multimax-init "$init" --entmax-alpha "$entmax_alpha" --attention-scale "$scale")
    [[ $lr_scale == 1 ]] || options+=(--modulator-lr-scale "$lr_scale")
    [[ -z $sites ]] || options+=(--attention-mapping-sites "$sites")
    [[ -z $terms ]] || options+=(--multimax-terms "$terms")
}

# Tokens in an update = processes · update-freq · max-tokens. More processes first reduce update-freq: the batches and
# their order are then those of a single process. The rest reduces max-tokens.
share_among_processes() {
    local rest=$processes divisor
    for ((divisor = rest; divisor > 1; divisor--)); do # the greatest common divisor
        if ((rest % divisor == 0 && update_freq % divisor == 0)); then break; fi
    done
    update_freq=$((update_freq / divisor))
    rest=$((rest / divisor))
    ((max_tokens % rest == 0)) ||
        die "--processes $processes: $max_tokens tokens cannot be shared among $rest; take a power of two"
    max_tokens=$((max_tokens / rest))
}

compose_command() {
    local options
    mapping_options
    share_among_processes
    read -r -a train_command <<<"${launch:+$launch -m fairseq_cli.train}"
    ((${#train_command[@]})) || train_command=(fairseq-train)
    # The plugin is needed for stock, too: it tells torch 2.6 and later that its checkpoints are safe to resume.
    train_command+=("$data/data-bin" --user-dir "$root/multimax_fairseq" "${options[@]}"
        ${model[@]+"${model[@]}"} "${training[@]}" "${length[@]}" --max-tokens "$max_tokens"
        --update-freq "$update_freq" --distributed-world-size "$processes" --seed "$seed"
        --save-dir "$run" --log-format simple --log-file "$run/train.log"
        # Makes batches for each epoch, seeded by its number. By default fairseq makes them once, seeded by the epoch in
        # which the process starts: a run stopped after its first epoch would resume with other batches.
        --update-epoch-batch-itr True)
    if ((average)); then
        train_command+=(--keep-last-epochs "$average")
    else
        train_command+=(--no-epoch-checkpoints)
    fi
    case $mapping in
        sparsemax) train_command+=(${sparsemax[@]+"${sparsemax[@]}"}) ;;
        entmax*) train_command+=(${entmax[@]+"${entmax[@]}"}) ;;
    esac
    # Without label smoothing: it wants a little probability for every word, which takes a sparse mapping its zeros.
    [[ $output_mapping == softmax || $output_mapping == multimax ]] ||
        train_command+=(--criterion entmax_loss --label-smoothing 0)
    [[ $precision == fp32 ]] || train_command+=("--$precision")
    train_command+=(${extra[@]+"${extra[@]}"})
}

# quoted WORD ...: as typed in a shell.
quoted() {
    local word line=
    for word in "$@"; do line+=" $(printf %q "$word")"; done
    echo "${line# }"
}

# ---------------------------------------------------------------- the three stages

prepare_data() {
    [[ ! -d $data/data-bin ]] || return 0
    if [[ -n $smoke ]]; then
        made_up=$(temporary -d)
        trap 'rm -rf "$made_up"' EXIT
        prepare_smoke "$made_up/source"
    else
        bash "$scripts/$prepare_script" --out "$data" ${prepare_options[@]+"${prepare_options[@]}"} \
            ${archive:+--archive "$archive"} ${from:+--from "$from"}
    fi
}

# What must not change when a run resumes: everything but its length, machines and paths.
settings_of_run() {
    printf '%s\n' "experiment=$experiment${smoke:+ (smoke)}" "mapping=$mapping" "sites=${sites:-all}" \
        "output-mapping=$output_mapping" "order=$order" "terms=${terms:-both}" "init=$init" \
        "lr-scale=$lr_scale" "scale=$scale" "entmax-alpha=$entmax_alpha" "seed=$seed" "precision=$precision" \
        "options=$(quoted ${choices[@]+"${choices[@]}"})" | LC_ALL=C sort
}

# Without a checkpoint nothing can be mixed up: fairseq-train may have refused an option.
check_settings() {
    local there
    if [[ ! -f $run/settings ]] || ! has_checkpoints; then return; fi
    there=$(cat "$run/settings")
    [[ $there == "$(settings_of_run)" ]] ||
        die "$run holds a run with other settings (there: $(only_in_first "$there" "$(settings_of_run)"); asked for:" \
            "$(only_in_first "$(settings_of_run)" "$there")). Choose another --out, or remove it"
}

has_checkpoints() { compgen -G "$run/checkpoint*.pt" >/dev/null; }

# begin_run: from here on only we use the run's folder, or the machines that train it together.
begin_run() {
    make_folder "$run"
    out=$(absolute_path "$run") # whose disk may be full
    lock "$run/.lock" ${launch:+shared} ${placement[@]+shared}
    check_settings
}

# is_trained: has it reached its length? If asked again for a --max-update that it has reached, fairseq itself trains
# one more update each time.
is_trained() { [[ -f $run/trained && $(cat "$run/trained") == "${length[*]}" ]]; }

train() {
    local status=0
    if is_trained; then
        info "already trained: $run"
        return
    fi
    check_data
    if [[ $precision != fp32 ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        die "--precision $precision needs a GPU, and torch sees none: --precision fp32 trains on the CPU"
    fi
    if has_checkpoints; then "$PYTHON" "$scripts/resume_checkpoint.py" "$run"; fi
    write_file "$run/settings" < <(settings_of_run)
    rm -f "$run/trained" "$run/run.json"
    keep_memory "${train_command[@]}" || status=$?
    ((status < 128)) || exit "$status" # stopped, and not failed
    ((status == 0)) || die "fairseq-train failed (exit status $status), as its last lines say"
    write_file "$run/trained" <<<"${length[*]}"
}

check_data() {
    local split file
    [[ -d $data/data-bin ]] || die "$data has no data-bin: run this with --only prepare first"
    for split in train valid test; do
        for file in "$data/data-bin/$split".*bin; do
            [[ -s $file ]] || die "$data/data-bin has no text of the split '$split': remove $data, and run this again"
        done
    done
}

evaluate_and_record() {
    [[ -f $run/checkpoint_best.pt ]] || die "$run has no checkpoint_best.pt: train first"
    rm -rf "$run"/{best,average}.* "$run"/*.eval "$run/run.json"
    evaluate
    "$PYTHON" "$scripts/record_run.py" "$run" --experiment "$experiment" ${smoke:+--smoke} \
        --command "$command_line" --train-command "$(quoted "${train_command[@]}")"
}

# translate_and_score CHECKPOINT PREFIX OPTION ...: scripts/score_translation.sh, with the references beside the scores.
translate_and_score() {
    local checkpoint=$1 prefix=$2
    shift 2
    bash "$scripts/score_translation.sh" --data-bin "$data/data-bin" --checkpoint "$run/$checkpoint" \
        --reference "$run/references" --out "$run/$prefix" "$@"
}

# score_best_and_average REFERENCE OPTION ...: the two scores of a translation model. The OPTIONs of
# scripts/score_translation.sh say how to turn tokens into text.
score_best_and_average() {
    local reference=$1 checkpoints
    shift
    write_file "$run/references" <"$reference"
    translate_and_score checkpoint_best.pt best "$@"
    checkpoints=$(find "$run" -name 'checkpoint[0-9]*.pt' | awk 'END { print NR }')
    ((checkpoints <= average)) || checkpoints=$average
    if ((checkpoints > 1)); then
        "$PYTHON" "$scripts/average_checkpoints.py" --last "$checkpoints" "$run" --output "$run/average.pt"
        translate_and_score average.pt average "$@"
    fi
}

# perplexity SPLIT WINDOW OPTION ...: of the best checkpoint, each token predicted from at least WINDOW before it.
perplexity() {
    local log=$run/$1.context-$2.eval
    fairseq-eval-lm "$data/data-bin" --user-dir "$root/multimax_fairseq" --path "$run/checkpoint_best.pt" \
        --gen-subset "$1" --context-window "$2" --sample-break-mode none --num-workers 0 "${@:3}" \
        >"$log.part" 2>&1 ||
        die "fairseq-eval-lm failed: $(why_it_failed "$log.part" "$data/data-bin" "$run/checkpoint_best.pt" "$1")"
    mv "$log.part" "$log"
    printf '%s, context window %s: %s\n' "$1" "$2" "$(grep -o 'Perplexity: .*' "$log")"
}

# ---------------------------------------------------------------- all of it

use_smoke_settings() {
    model=("${smoke_model[@]}")
    training+=(--num-workers 0 --cpu ${smoke_training[@]+"${smoke_training[@]}"})
    length=("${smoke_length[@]}")
    precision=fp32
    max_tokens=1024
    update_freq=1
    ((average < 2)) || average=2
}

run_experiment() {
    local folder=$experiment command_line
    command_line=$(quoted "$0" "$@")
    parse_run_options "$@"
    sort_extra
    if [[ -n $smoke ]]; then
        use_smoke_settings
        folder=smoke/$experiment
    fi
    data=${data:-data/$folder}
    run=${run:-${runs:-runs/$folder}/$(run_name)}
    compose_command
    if [[ -n $dry_run ]]; then
        quoted "${train_command[@]}"
        return
    fi
    need_python
    need_fairseq
    check_settings
    if [[ -z $only && -f $run/run.json ]] && is_trained; then
        info "already done: $run/run.json"
        return
    fi
    if [[ -z $only || $only == prepare ]]; then prepare_data; fi
    [[ $only == prepare ]] || begin_run
    if [[ -z $only || $only == train ]]; then train; fi
    if [[ -z $only || $only == evaluate ]]; then evaluate_and_record; fi
}
