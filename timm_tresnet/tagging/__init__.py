"""From annotated images to a network that tags others: what `timm-tresnet train-tagger` puts together.

Training needs the extra `tagging`: the loop is Lightning's, transforms are torchvision's; optimizers, schedules, the
moving average and the asymmetric loss are timm's. Measuring (`timm-tresnet validate`) needs nothing but timm.
"""
