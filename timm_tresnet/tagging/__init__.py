"""Train and validate taggers on annotated images: the code behind `timm-tresnet train-tagger` and `validate`.

Training needs the extra `tagging`: the loop is from Lightning, the transforms are from torchvision; optimizers,
schedules, the moving average and the asymmetric loss are from timm. Validation needs only timm.
"""
