#!/usr/bin/env bash
# Trains test_tresnet.mosaic_cifar10 with `timm-tresnet train-tagger`, then packs the weights.
#
#     hub/mosaic_cifar10/train.sh DATA OUTPUT
#
# DATA: folder that prepare.py wrote. OUTPUT: folder of the tagger, must not exist yet. A minute and a half on one core.
# Cutout and RandAugment, which are official, can take a whole photograph away, label and all. The moving average of the
# official settings would still be the start after so few steps. Training starts from the weights of r64_cifar10.
set -euo pipefail
data=$1 output=$2
package=$(dirname "$0")/../../timm_tresnet
export OMP_NUM_THREADS=1

timm-tresnet train-tagger "$data/train.csv" --val "$data/val.csv" --output "$output" \
    --model test_tresnet.r64_cifar10 --epochs 2 --batch-size 64 --lr 2e-3 --ema-decay 0.99 \
    --cutout 0 --randaugment 0 --channels-last --device cpu --workers 0 --seed 0
python "$(dirname "$0")/../test_tresnet/pack.py" "$output/model.safetensors" \
    "$package/weights/test_tresnet.mosaic_cifar10.safetensors"
grep thresholds "$output/config.json" # which timm_tresnet/tresnet.py repeats
