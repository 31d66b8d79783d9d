"""Audit Hub repositories of converted weights: files, hashes, config, safetensors header, card.

python hub/verify.py ORG/NAME ORG/NAME@REVISION
python hub/verify.py --weights ORG/NAME    # also downloads and hashes model.safetensors; else only its header is read

Prints problems; the exit status is then 1.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checks import CARD, CONFIG, PICKLES, REQUIRED, WEIGHTS, find_problems, hash_file, list_files
from client import connect, explain, find_commit
from huggingface_hub import HfApi
from huggingface_hub.errors import SafetensorsParsingError

from timm_tresnet.utils.errors import summarise
from timm_tresnet.utils.terminal import escape


def audit(api: HfApi, repo_id: str, revision: str | None = None, download_weights: bool = False) -> list[str]:
    """Find the problems of a repository.

    Args:
        api: client of the Hub.
        repo_id: the repository.
        revision: branch, tag or commit; None for the newest.
        download_weights: also download model.safetensors and compare its hash; otherwise only its header is read.

    Returns:
        The problems, one sentence each.
    """
    commit = find_commit(api, repo_id, revision)
    held = list_files(api, repo_id, commit)
    findings = [f"{path} is a pickle" for path in held if path.endswith(PICKLES)]
    if missing := [path for path in REQUIRED if path not in held]:
        return findings + [f"{path} is missing" for path in missing]
    wanted = [*REQUIRED] if download_weights else [CONFIG, CARD]
    with tempfile.TemporaryDirectory() as empty_cache:
        folder = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=empty_cache, allow_patterns=wanted))
        findings += [
            f"the downloaded {path} does not have the hash that the Hub lists"
            for path in wanted
            if not hash_file(folder / path).is_same(held[path])
        ]
        try:
            header = api.parse_safetensors_file_metadata(repo_id, WEIGHTS, revision=commit)
        except SafetensorsParsingError as error:
            return [*findings, f"{WEIGHTS} has no readable header: {summarise(error)}"]
        end = max((tensor.data_offsets[1] for tensor in header.tensors.values()), default=0)
        if held[WEIGHTS].size < 8 + end:
            findings.append(f"{WEIGHTS} has {held[WEIGHTS].size} bytes, but its tensors need {end}")
        shapes = {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
        findings += find_problems(folder, shapes, repo_id)
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments without the script's name; None for those of the process.

    Returns:
        Exit status: 0 without problems, else 1.
    """
    parser = argparse.ArgumentParser(description="Audit Hub repositories of converted weights.")
    parser.add_argument("repositories", nargs="+", metavar="ORG/NAME[@REVISION]")
    parser.add_argument("--weights", action="store_true", help="also download model.safetensors and compare its hash")
    arguments = parser.parse_args(argv)
    failed = False
    for name in arguments.repositories:
        repo_id, _, revision = name.partition("@")
        try:
            # A new connection each: the rest of a wrong answer would spoil the next repository's.
            findings = audit(connect(), repo_id, revision or None, arguments.weights)
        except Exception as error:  # the client does not check answers, so a wrong one can raise anything
            findings = [explain(error, repo_id)]
        failed = failed or bool(findings)
        print("\n".join(f"{name}: {escape(finding)}" for finding in findings or ["nothing to report"]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
