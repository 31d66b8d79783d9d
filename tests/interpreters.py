"""Start new interpreters for tests, and query them."""

# For an interpreter in which no warning may pass, but what PyTorch 2.5 itself says of a folder that it made.
STRICTLY = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
OURS, BUILTIN = "timm_tresnet.models.network", "timm.models.tresnet"  # what WHO_BUILDS prints
WHO_BUILDS = "import timm; print(type(timm.create_model('tresnet_m', device='meta')).__module__)"
