"""The page of `timm-tresnet demo`, and what it shows about a photograph."""
