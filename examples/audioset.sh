#!/usr/bin/env bash
# The whole road on AudioSet: train four different sub-models on frame-level records, average,
# select, fuse in bfloat16, export one ONNX file, and score every step on the test records.
#
#   examples/audioset.sh DATA OUT
#
# DATA/audioset/frame/{train,validate,test}/*.tfrecord are AudioSet's frame-level records, and
# DATA/audioset/class_labels_indices.csv its class names. OUT becomes a workspace. The recipes have
# the papers' parts at sizes that two cores train in minutes; QUICK=1 only tries the road out.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: $0 DATA OUT" >&2
    exit 2
fi
data=$(realpath "$1")/audioset
mkdir -p "$2"
cd "$2"

stage() { # stage NAME COMMAND...: print the command, run it, note its seconds
    local name=$1 start=$EPOCHREALTIME
    shift
    echo "\$ $*"
    "$@"
    awk -v name="$name" -v start="$start" -v end="$EPOCHREALTIME" \
        'BEGIN { printf "%s\t%.1f\n", name, end - start }' >>seconds.tsv
}

train() { # train NAME RECIPE KEY=VALUE...
    local name=$1 recipe=$2 sets=()
    shift 2
    for value in "$@" ${QUICK:+training.max_steps=20 training.checkpoint_every=10}; do
        sets+=(--set "$value")
    done
    stage "train $name" ensemble-kit train "$recipe" --name "$name" \
        --train "$data/frame/train" --validation "$data/frame/validate" \
        --label-names "$data/class_labels_indices.csv" "${sets[@]}"
}

: >seconds.tsv
schedule=(
    training.batch_size=128 training.learning_rate_decay=0.8 training.examples_per_decay=20_000
    training.batch_norm_momentum=0.02 training.checkpoint_every=100 training.average_last=5
)
train average-moe willow/average-moe-cg "${schedule[@]}" training.max_steps=1500 \
    training.learning_rate=0.01
train soft-bof willow/bow "${schedule[@]}" training.max_steps=1000 \
    training.learning_rate=0.001 pooling.num_clusters=2000 hidden.size=512
train gated-netvlad willow/gated-net-vlad "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.001 pooling.num_clusters=64 hidden.size=512
train gru willow/gru "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.002 pooling.hidden_size=256

stage select ensemble-kit select
stage "fuse fp32" ensemble-kit fuse --dtype fp32 -o ensemble/fused-fp32.safetensors
stage "fuse bf16" ensemble-kit fuse --dtype bf16
stage "export once" ensemble-kit export-onnx --repeats 1 -o ensemble/once.onnx
stage export ensemble-kit export-onnx
stage report ensemble-kit report "$data/frame/test" --label-names "$data/class_labels_indices.csv"
