"""The web page of `timm-tresnet demo`, and the explanations that it shows."""
