"""From annotated images to a network that tags others: what `timm-tresnet train-tagger` puts together.

Needs the extra `tagging`. The loop is Lightning's, transforms are torchvision's, figures torchmetrics'; optimizers,
schedules, the moving average and the asymmetric loss are timm's.
"""
