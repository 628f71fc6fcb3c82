#!/usr/bin/env bash
# The whole pipeline on AudioSet: train five sub-models of four kinds on frame-level records,
# average their checkpoints, select, fuse, export one ONNX file, and score every model on test
# records.
#
#   examples/audioset.sh DATA OUT
#
# DATA/audioset/frame/{train,validate,test}/*.tfrecord are AudioSet's frame-level records, and
# DATA/audioset/class_labels_indices.csv its class names. OUT becomes a workspace. The recipes have
# the papers' parts at sizes that two cores train in minutes; QUICK=1 is a short trial.
set -euo pipefail
source "$(dirname "$0")/stages.sh"
[ $# -eq 2 ] || usage DATA OUT
data=$(realpath "$1")/audioset
records=$data/frame names=$data/class_labels_indices.csv
workspace "$2"

schedule=(
    training.batch_size=128 training.learning_rate_decay=0.8 training.examples_per_decay=20_000
    training.batch_norm_momentum=0.02 training.checkpoint_every=100 training.average_last=5
)
train average-moe willow/average-moe-cg "${schedule[@]}" training.max_steps=1500 \
    training.learning_rate=0.01
train soft-bof willow/bow "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.003 pooling.num_clusters=1000 hidden.size=512
train netvlad-16 willow/gated-net-vlad "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.002 pooling.num_clusters=16 hidden.size=1024 head.num_experts=4
train netvlad-64 willow/gated-net-vlad "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.001 pooling.num_clusters=64 hidden.size=512
train gru willow/gru "${schedule[@]}" training.max_steps=1000 \
    training.learning_rate=0.002 pooling.hidden_size=256

ship
