"""The commands of `timm-tresnet`, a module each.

A command has ABOUT, what its parser says of it; EXAMPLE, what can be typed behind `timm-tresnet`;
`add_options(parser)`; and `run(words, **options)`, which gets the words of the whole command line and the options by
name, and returns the exit status.
"""

import sys
from typing import Any

from timm_tresnet.utils.errors import summarise


class CommandError(Exception):
    """Says what keeps a command from running; ends it with exit status 2."""


def warn_of_assumed(network: Any) -> None:
    """Say on standard error what is assumed about a network's images, if anything is."""
    from timm_tresnet.weights.preprocessing import explain_assumed

    explained = explain_assumed(network)
    if explained:
        print(f"timm-tresnet: {explained}", file=sys.stderr)


def refuse_compiled_ratios(keep_ratio: bool, compile: bool) -> None:
    """Refuse to compile a network for images whose aspect ratio is kept.

    Raises:
        CommandError: if it is asked for.
    """
    if keep_ratio and compile:
        raise CommandError("--compile is for images of one size, and would take its time for each; omit --keep-ratio")


def prepare_keep_ratio(network: Any) -> int:
    """Say on standard error what --keep-ratio does, and return of which number sides are multiples.

    Raises:
        CommandError: if the network takes images of one size only.
    """
    from timm_tresnet.deployment.running import find_size_multiple
    from timm_tresnet.weights.aspect_ratio import choose_side
    from timm_tresnet.weights.preprocessing import resolve_preprocessing

    try:
        multiple = find_size_multiple(network)
    except ValueError as error:
        raise CommandError(f"--keep-ratio: {error}") from error
    print(
        f"timm-tresnet: --keep-ratio: short sides become {choose_side(resolve_preprocessing(network))} pixels, long "
        f"ones keep the ratio, and what is beyond a multiple of {multiple} is cut off",
        file=sys.stderr,
    )
    return multiple


def choose_machine(device: str, amp: str | None, channels_last: bool, compile: bool, engine: Any) -> str:
    """The device that a model runs on, or, for an artifact, that its images are on.

    Raises:
        CommandError: if this machine has no such device, or the options are not about artifacts.
    """
    from timm_tresnet.cli.options import choose_device

    if engine and (device not in ("auto", "cpu") or amp or channels_last or compile):
        raise CommandError("--device, --amp, --channels-last and --compile are about models, not about --engine")
    try:
        return "cpu" if engine else choose_device(device)
    except ValueError as error:
        raise CommandError(str(error)) from error


def load_classifier(model: str, engine: tuple[str, str] | None, trust: bool) -> Any:
    """A model with its weights, or the artifact of --engine.

    Raises:
        CommandError: if it cannot be loaded, has no classes, or takes neither grey nor RGB images.
    """
    from timm_tresnet.utils.images import CHANNELS

    network, name = (_load_artifact(*engine, trust), engine[1]) if engine else (load_model(model), model)
    if network.num_classes == 0:
        raise CommandError(f"{name} is a backbone without classes")
    if network.in_chans not in CHANNELS:
        some = " or ".join(map(str, CHANNELS))
        raise CommandError(f"{name} takes {network.in_chans} channels, images are read in {some}")
    return network


def _load_artifact(engine: str, artifact: str, trust: bool) -> Any:
    from timm_tresnet import ExportedModel
    from timm_tresnet.deployment import ENGINES

    if engine not in ENGINES:
        raise CommandError(f"--engine needs one of {', '.join(ENGINES)} and a file, got {engine} {artifact}")
    try:
        return ExportedModel(artifact, engine, trust=trust)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"cannot load {artifact}: {summarise(error)}") from error


def load_model(name: str) -> Any:
    """A TResNet with its weights, in eval mode, by a name as `timm_tresnet.weights.loading.load_network` takes it."""
    from timm_tresnet.weights.loading import load_network

    try:
        return load_network(name)
    except ValueError as error:
        raise CommandError(str(error)) from error
