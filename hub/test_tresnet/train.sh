#!/usr/bin/env bash
# Trains test_tresnet on class folders of CIFAR-10 with timm's unchanged train.py, then packs and validates the weights.
#
#     hub/test_tresnet/train.sh SCRIPTS DATA OUTPUT
#
# SCRIPTS: folder with timm's train.py and validate.py. DATA: folder that prepare.py wrote. OUTPUT: for checkpoints.
# About three hours on two cores. Each run starts from the weights of the one before: the second with less augmentation, the
# third mixes images (mixup, CutMix), the fourth does not, the fifth does again. The ends of the last three are averaged.
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
later=(--sched-on-updates --model-kwargs recompute=none)
mixing=(--scale 0.6 1.0 --ratio 0.8 1.25 --mixup 0.2 --cutmix 1.0 --mixup-prob 0.5)
python "$scripts/train.py" "${common[@]}" "${later[@]}" "${mixing[@]}" --experiment third \
    --initial-checkpoint "$output/second/last.pth.tar" --lr 0.1 --epochs 80 --warmup-epochs 1 --warmup-lr 0.01
python "$scripts/train.py" "${common[@]}" "${later[@]}" --experiment fourth \
    --initial-checkpoint "$output/third/last.pth.tar" --lr 0.02 --epochs 16 --warmup-epochs 0 \
    --scale 0.7 1.0 --ratio 0.85 1.18
python "$scripts/train.py" "${common[@]}" "${later[@]}" "${mixing[@]}" --experiment fifth --seed 1 \
    --initial-checkpoint "$output/fourth/last.pth.tar" --lr 0.05 --epochs 32 --warmup-epochs 0
python "$here/average.py" "$data" "$output/average.safetensors" "$output"/{third,fourth,fifth}/last.pth.tar
python "$here/pack.py" "$output/average.safetensors" \
    "$here/../../timm_tresnet/weights/test_tresnet.r64_cifar10.safetensors"
python "$scripts/validate.py" --data-dir "$data" --split test --model test_tresnet --pretrained --device cpu -b 500
