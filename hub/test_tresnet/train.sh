#!/usr/bin/env bash
# Trains test_tresnet on class folders of CIFAR-10 with timm's unchanged train.py, then packs and validates the weights.
#
#     hub/test_tresnet/train.sh SCRIPTS DATA OUTPUT
#
# SCRIPTS: folder with timm's train.py and validate.py. DATA: folder that prepare.py wrote. OUTPUT: for checkpoints.
# About an hour and a half on two cores. The second run starts from the weights of the first, with less augmentation.
set -euo pipefail
scripts=$1 data=$2 output=$3
here=$(dirname "$0")
preprocessing=(--input-size 3 64 64 --mean 0 0 0 --std 1 1 1 --crop-pct 1.0 --interpolation bilinear)
common=(--data-dir "$data" --train-split train --val-split test --model test_tresnet --num-classes 10
    "${preprocessing[@]}" --train-interpolation bilinear --color-jitter 0 --smoothing 0.1
    --device cpu --channels-last -j 1 -b 128 -vb 500 --seed 0
    --opt sgd --momentum 0.9 --weight-decay 5e-4 --sched cosine --cooldown-epochs 0 --checkpoint-hist 2
    --output "$output")
export OMP_NUM_THREADS=1

python "$scripts/train.py" "${common[@]}" --experiment first \
    --lr 0.1 --epochs 32 --warmup-epochs 2 --warmup-lr 0.01 --scale 0.5 1.0
python "$scripts/train.py" "${common[@]}" --experiment second --initial-checkpoint "$output/first/last.pth.tar" \
    --lr 0.05 --epochs 16 --warmup-epochs 0 --scale 0.7 1.0 --ratio 0.85 1.18
python "$here/pack.py" "$output/second/last.pth.tar" \
    "$here/../../timm_tresnet/weights/test_tresnet.r64_cifar10.safetensors"
python "$scripts/validate.py" --data-dir "$data" --split test --model test_tresnet --pretrained --device cpu -b 500
