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

train() { # train NAME RECIPE KEY=VALUE...; SHARE=30 takes 30 % of the steps, QUICK=1 a few small ones
    local name=$1 recipe=$2 sets=() value quick
    shift 2
    quick="training.max_steps=4 training.checkpoint_every=2 training.batch_size=16"
    for value in "$@" ${QUICK:+$quick}; do
        case $value in
        *.num_clusters=* | *.hidden_size=* | hidden.size=*) [ ! "${QUICK:-}" ] || value=${value%=*}=8 ;;
        training.max_steps=*) value=training.max_steps=$((${value#*=} * ${SHARE:-100} / 100)) ;;
        esac
        sets+=(--set "$value")
    done
    stage "train $name" ensemble-kit train "$recipe" --name "$name" --train "$records/train" \
        --validation "$records/validate" --label-names "$names" --ema 0.99 \
        --predict-dtype int8,int4 "${sets[@]}"
}

precisions() { # the best ensemble in bf16 and with precisions free, under a limit that binds
    local limit
    limit=$(python - <<'END'
import json
selection = json.load(open("ensemble/selection.json"))
smallest = min(candidate["bytes"] for candidate in selection["candidates"])
print(max(selection["bytes"] // 2, selection["shared_bytes"] + smallest))
END
    )
    for dtype in bf16 auto; do
        stage "select $dtype" ensemble-kit select --dtype "$dtype" --max-size "$limit" \
            -o "half/$dtype/selection.json"
        stage "fuse $dtype" ensemble-kit fuse "half/$dtype/selection.json" --max-size "$limit" \
            -o "half/$dtype/fused.safetensors"
        stage "evaluate $dtype" ensemble-kit evaluate "half/$dtype/fused.safetensors" \
            "$records/test" --label-names "$names"
    done
}

ship() { # from trained runs to one scored ONNX file
    stage select ensemble-kit select
    stage "fuse fp32" ensemble-kit fuse --dtype fp32 -o ensemble/fused-fp32.safetensors
    local checked=(--data "$records/validate" --label-names "$names")
    checked+=(${QUICK:+--max-gap-loss 1})  # after four steps GAP is little better than chance
    stage "fuse bf16" ensemble-kit fuse "${checked[@]}"
    stage "fuse int8" ensemble-kit fuse --dtype int8 -o ensemble/fused-int8.safetensors "${checked[@]}"
    stage export ensemble-kit export-onnx  # first, so that the model card describes this file
    stage "export once" ensemble-kit export-onnx --repeats 1 -o ensemble/once.onnx
    precisions
    stage report ensemble-kit report "$records/test" --label-names "$names"
}
