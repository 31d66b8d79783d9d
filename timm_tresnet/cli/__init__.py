"""The `timm-tresnet` command."""
