"""`timm-tresnet recipe` prints a training recipe as a command line for timm's train.py."""

import argparse
import ast
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tresnet.cli.commands import CommandError
from timm_tresnet.cli.options import at_least
from timm_tresnet.utils.names import suggest
from timm_tresnet.utils.tables import format_columns
from timm_tresnet.variants import explain_unknown

ABOUT = {
    "help": "print a training recipe for timm's train.py",
    "description": "Print a training recipe as the command line of timm's unchanged train.py, with every flag spelled "
    "out. Flags of train.py after -- replace those of the recipe. Without NAME, list the recipes.",
}
EXAMPLE = "recipe transfer --data-dir flowers --model tresnet_m --num-classes 102"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a recipe (default: list them)")
    parser.add_argument("--data-dir", metavar="DIR", help="the images, as train.py takes them")
    parser.add_argument("--model", help="the model to train, as train.py takes it")
    parser.add_argument("--num-classes", type=at_least(1), metavar="N", help="classes (default: those of the model)")
    parser.add_argument("--show", action="store_true", help="print the recipe's file instead, with its sources")


def run(
    words: Sequence[str],
    *,
    name: str | None,
    data_dir: str | None,
    model: str | None,
    num_classes: int | None,
    show: bool,
) -> int:
    """Print the list of recipes, a recipe's file, or the command line that it stands for."""
    recipes = find_recipes()
    if name is None:
        if len(words) > 1:
            raise CommandError(f"name a recipe: {', '.join(recipes)}")
        print(format_columns([[known, _read_summary(file)] for known, file in recipes.items()]))
        return 0
    if name not in recipes:
        meant = suggest(name, recipes) or f"; choose from {', '.join(recipes)}"
        raise CommandError(f"there is no recipe {name!r}{meant}")
    if show:
        print(recipes[name].read_text(encoding="utf-8"), end="")
        return 0
    if not data_dir or not model:
        raise CommandError(f"recipe {name} needs --data-dir DIR and --model MODEL, or --show to print its file")
    given = {"data_dir": data_dir, "model": model} | ({"num_classes": num_classes} if num_classes else {})
    further = words[words.index("--") + 1 :] if "--" in words else []
    given |= read_recipe(recipes[name])
    for note in _choose_device(given, further), _check_model(model):
        if note:
            print(f"timm-tresnet: {note}", file=sys.stderr)
    line = ["python", "train.py", *format_flags(given), *further]
    print(*(quote_word(word, sys.stdout.encoding or "utf-8") for word in line))
    return 0


def _choose_device(flags: dict[str, Any], further: Sequence[str]) -> str | None:
    """Add --device cpu where train.py's own default, CUDA, would end it at once; returns what to say about it."""
    import torch

    if torch.cuda.is_available() or any(word.partition("=")[0] == "--device" for word in further):
        return None
    flags["device"] = "cpu"
    return "there is no CUDA here, train.py's default, hence --device cpu; leave it out where there is a GPU"


def _check_model(name: str) -> str | None:
    """What to say about a name that timm does not know; a module of the user's own may yet bring it."""
    if ":" in name or not (unknown := explain_unknown(name)):
        return None
    import timm

    return None if timm.is_model(name.partition(".")[0]) else unknown


def find_recipes() -> dict[str, Path]:
    """The files of the recipes by their names; in a clone, they lie beside the package."""
    package = Path(__file__).parents[2]
    inside, beside = package / "recipes", package.parent / "recipes"
    return {file.stem: file for file in sorted((inside if inside.is_dir() else beside).glob("*.yaml"))}


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe's values by the names that train.py's parser has for them (`weight_decay`)."""
    import yaml  # a dependency of timm

    return yaml.safe_load(file.read_text(encoding="utf-8"))


def format_flags(recipe: dict[str, Any]) -> list[str]:
    """The flags of train.py that say what `--config FILE` says.

    True is the flag alone, a list its values one after the other, a mapping KEY=VALUE for each entry. What begins with
    a dash, and would be read as a flag, is joined to its own by an equals sign. False and None, which no flag says, are
    refused.
    """
    flags = []
    for name, value in recipe.items():
        if value is None or value is False:
            raise ValueError(f"no flag of train.py says {name}: {value}; leave it out")
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, dict):
            flags += [flag, *(f"{key}={_format_entry(entry)}" for key, entry in value.items())]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return flags


def quote_word(word: str, encoding: str) -> str:
    r"""A word as a shell reads it back.

    Bytes that a terminal would act on, or that are no text or cannot be printed in this encoding, are spelled as in
    $'caf\303\251', which bash, zsh and ksh read.
    """
    try:
        word.encode(encoding)
        printable = word.isprintable()
    except UnicodeEncodeError:
        printable = False
    if printable:
        return shlex.quote(word)
    plain = set(range(ord(" "), ord("~") + 1)) - set(b"\\'")
    return "$'" + "".join(chr(byte) if byte in plain else f"\\{byte:03o}" for byte in os.fsencode(word)) + "'"


def _format_entry(entry: Any) -> str:
    """A value of --model-kwargs: train.py reads a Python literal, or else a text."""
    if isinstance(entry, str):
        try:
            ast.literal_eval(entry)
        except (ValueError, SyntaxError):
            return entry
    return repr(entry)


def _read_summary(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return lines.readline().removeprefix("#").strip()
