#!/usr/bin/env bash
# The whole road on YouTube-8M's video-level records: logistic regression and a mixture of experts,
# each with and without gating of the probabilities, from training to one scored ONNX file.
#
#   examples/youtube8m_video.sh DATA OUT
#
# DATA/yt8m/video/{train,validate,test}/*.tfrecord are video-level records, and
# DATA/yt8m/label_names_2018.csv the class names. OUT becomes a workspace. The sub-models have the
# papers' sizes and a schedule that two cores finish in minutes; QUICK=1 only tries the road out.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: $0 DATA OUT" >&2
    exit 2
fi
data=$(realpath "$1")/yt8m
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
    for value in "$@" ${QUICK:+training.max_steps=4 training.checkpoint_every=2}; do
        sets+=(--set "$value")
    done
    stage "train $name" ensemble-kit train "$recipe" --name "$name" \
        --train "$data/video/train" --validation "$data/video/validate" \
        --label-names "$data/label_names_2018.csv" "${sets[@]}"
}

: >seconds.tsv
schedule=(
    training.batch_size=256 training.learning_rate=0.002 training.learning_rate_decay=0.8
    training.examples_per_decay=50_000 training.batch_norm_momentum=0.02
    training.checkpoint_every=90 training.average_last=5
)
train logistic willow/average-logistic "${schedule[@]}" training.max_steps=1800
train gated-logistic willow/average-logistic "${schedule[@]}" training.max_steps=900 \
    head.probability_gating=true
train moe mfb/average-concat "${schedule[@]}" training.max_steps=900
train gated-moe willow/average-moe-cg "${schedule[@]}" training.max_steps=720

stage select ensemble-kit select
stage "fuse fp32" ensemble-kit fuse --dtype fp32 -o ensemble/fused-fp32.safetensors
stage "fuse bf16" ensemble-kit fuse --dtype bf16
stage "export once" ensemble-kit export-onnx --repeats 1 -o ensemble/once.onnx
stage export ensemble-kit export-onnx
stage report ensemble-kit report "$data/video/test" --label-names "$data/label_names_2018.csv"
