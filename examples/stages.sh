# Functions that the examples share. An example sources this file, then sets `records`, the folder
# of train, validate and test records, and `names`, the CSV file of class names.

usage() { # usage ARGUMENT...
    echo "usage: $0 $*" >&2
    exit 2
}

workspace() { # workspace FOLDER: work in it, and write the seconds of every stage to seconds.tsv
    mkdir -p "$1"
    cd "$1"
    : >seconds.tsv
}

stage() { # stage NAME COMMAND...: print the command, run it, write down its seconds
    local name=$1 start=$EPOCHREALTIME
    shift
    echo "\$ $*"
    "$@"
    awk -v name="$name" -v start="$start" -v end="$EPOCHREALTIME" \
        'BEGIN { printf "%s\t%.1f\n", name, end - start }' >>seconds.tsv
}

train() { # train NAME RECIPE KEY=VALUE...; QUICK=1 takes a few steps only
    local name=$1 recipe=$2 sets=()
    shift 2
    for value in "$@" ${QUICK:+training.max_steps=4 training.checkpoint_every=2}; do
        sets+=(--set "$value")
    done
    stage "train $name" ensemble-kit train "$recipe" --name "$name" --train "$records/train" \
        --validation "$records/validate" --label-names "$names" --ema 0.99 "${sets[@]}"
}

ship() { # from trained runs to one scored ONNX file
    stage select ensemble-kit select
    stage "fuse fp32" ensemble-kit fuse --dtype fp32 -o ensemble/fused-fp32.safetensors
    local checked=(--data "$records/validate" --label-names "$names")
    checked+=(${QUICK:+--max-gap-loss 1})  # after four steps GAP is little better than chance
    stage "fuse bf16" ensemble-kit fuse --dtype bf16 "${checked[@]}"
    stage "fuse int8" ensemble-kit fuse --dtype int8 -o ensemble/fused-int8.safetensors "${checked[@]}"
    stage export ensemble-kit export-onnx  # first, so that the model card describes this file
    stage "export once" ensemble-kit export-onnx --repeats 1 -o ensemble/once.onnx
    stage report ensemble-kit report "$records/test" --label-names "$names"
}
