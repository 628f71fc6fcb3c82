#!/usr/bin/env bash
# The whole pipeline on YouTube-8M's video-level records: logistic regression and a mixture of
# experts, each with and without gating of the probabilities, from training to one scored ONNX file.
#
#   examples/youtube8m_video.sh DATA OUT
#
# DATA/yt8m/video/{train,validate,test}/*.tfrecord are video-level records, and
# DATA/yt8m/label_names_2018.csv the class names. OUT becomes a workspace. The sub-models have the
# papers' sizes and a schedule that two cores finish in minutes; QUICK=1 is a short trial.
set -euo pipefail
source "$(dirname "$0")/stages.sh"
[ $# -eq 2 ] || usage DATA OUT
data=$(realpath "$1")/yt8m
records=$data/video names=$data/label_names_2018.csv
workspace "$2"

schedule=(
    training.batch_size=256 training.learning_rate_decay=0.8 training.examples_per_decay=40_000
    training.batch_norm_momentum=0.02 training.checkpoint_every=90 training.average_last=3
)
train logistic willow/average-logistic "${schedule[@]}" training.max_steps=900 \
    training.learning_rate=0.05
train gated-logistic willow/average-logistic "${schedule[@]}" training.max_steps=540 \
    training.learning_rate=0.03 head.probability_gating=true
train moe mfb/average-concat "${schedule[@]}" training.max_steps=360 training.learning_rate=0.02
train gated-moe willow/average-moe-cg "${schedule[@]}" training.max_steps=360 \
    training.learning_rate=0.015

ship
