"""Publish a folder of converted weights as a Hub repository, or hub/space as a Space.

python hub/publish.py FOLDER --repo ORG/NAME                             # shows the changes, makes none
python hub/publish.py FOLDER --repo ORG/NAME --push --revision-tag v1    # makes them
python hub/publish.py hub/space --repo ORG/NAME --space --push

The login is the huggingface_hub client's (`hf auth login` or HF_TOKEN). After an interruption, run it again; uploaded
files are not sent again.
"""

import argparse
import dataclasses
import difflib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checks import (
    CARD,
    CONFIG,
    PICKLES,
    REQUIRED,
    SPACE_REQUIRED,
    SPACE_SDK,
    WEIGHTS,
    LocalFile,
    find_problems,
    find_space_problems,
    hash_file,
    list_files,
    read_shapes,
)
from client import connect, explain, find_commit
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError

from timm_tresnet.conversion.card import PLACEHOLDER
from timm_tresnet.utils.terminal import escape

_SHOWN_LINES = 60  # of a diff; label lists are long


class PublishError(Exception):
    """A plan cannot be carried out; the message says why."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The changes that publishing would make.

    Args:
        repo_id: the repository.
        files: files to publish by path in the repository.
        commit: newest commit of the repository; None if there is no repository yet.
        states: "new", "changed" or "same" for each file by path.
        others: paths that only the repository has; they stay.
        differences: unified diffs of config.json and README.md, or of every file of a Space.
        tags: commit of each tag of the repository.
        repo_type: "model" or "space".
    """

    repo_id: str
    files: dict[str, LocalFile]
    commit: str | None
    states: dict[str, str]
    others: list[str]
    differences: list[str]
    tags: dict[str, str]
    repo_type: str = "model"

    @property
    def to_send(self) -> list[str]:
        """Paths of new and changed files."""
        return [path for path, state in self.states.items() if state != "same"]


def read_folder(folder: Path, repo_id: str) -> dict[str, LocalFile]:
    """Read and check the files of a folder.

    Args:
        folder: folder written by `timm-tresnet convert` or hub/convert.py.
        repo_id: repository to name in the card's examples.

    Returns:
        Files by path in the repository, without hidden ones.

    Raises:
        ValueError: if the folder has problems; the message lists them all.
    """
    paths = _list_files(folder, REQUIRED)
    card = (folder / CARD).read_text(encoding="utf-8").replace(PLACEHOLDER, f"hf-hub:{repo_id}").encode()
    with tempfile.TemporaryDirectory() as checked:
        (Path(checked) / CONFIG).write_bytes((folder / CONFIG).read_bytes())
        (Path(checked) / CARD).write_bytes(card)
        try:
            problems = find_problems(Path(checked), read_shapes(folder / WEIGHTS), repo_id)
        except (SafetensorError, ValueError) as error:
            problems = [f"{WEIGHTS} has no readable header: {error}"]
    if problems:
        raise ValueError("\n".join(problems))
    return {name: hash_file(card if name == CARD else path) for name, path in paths.items()}


def read_space(folder: Path) -> dict[str, LocalFile]:
    """Read and check the files of a Space.

    Args:
        folder: a folder such as hub/space.

    Returns:
        Files by path in the repository, without hidden ones.

    Raises:
        ValueError: if the folder has problems; the message lists them all.
    """
    paths = _list_files(folder, SPACE_REQUIRED)
    problems = find_space_problems(folder)
    if problems:
        raise ValueError("\n".join(problems))
    return {name: hash_file(path) for name, path in paths.items()}


def _list_files(folder: Path, required: Sequence[str]) -> dict[str, Path]:
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    }
    problems = [f"{name} is missing" for name in required if name not in paths]
    problems += [f"{name} is a pickle, which is not published" for name in paths if name.endswith(PICKLES)]
    if problems:
        raise ValueError("\n".join(problems))
    return paths


def make_plan(api: HfApi, files: dict[str, LocalFile], repo_id: str, repo_type: str = "model") -> Plan:
    """Compare files with a repository's.

    Args:
        api: client of the Hub.
        files: from `read_folder` or `read_space`.
        repo_id: the repository; it need not exist.
        repo_type: "model" or "space".

    Returns:
        The changes that publishing would make.
    """
    try:
        commit = find_commit(api, repo_id, repo_type=repo_type)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return Plan(repo_id, files, None, dict.fromkeys(files, "new"), [], [], {}, repo_type)
    held = list_files(api, repo_id, commit, repo_type)
    states = {
        path: "new" if path not in held else "same" if file.is_same(held[path]) else "changed"
        for path, file in files.items()
    }
    differences = [
        _show_difference(api, repo_id, commit, path, files[path], repo_type)
        for path in (files if repo_type == "space" else (CONFIG, CARD))
        if states[path] == "changed"
    ]
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}
    others = sorted(path for path in held if path not in files and not path.startswith("."))
    return Plan(repo_id, files, commit, states, others, differences, tags, repo_type)


def describe(plan: Plan) -> str:
    """Describe a plan in text.

    Args:
        plan: from `make_plan`.

    Returns:
        Several lines.
    """
    name = f"the Space {plan.repo_id}" if plan.repo_type == "space" else plan.repo_id
    if plan.commit:
        lines = [f"{name} is at {plan.commit}"]
    else:
        lines = [f"{name} will be created (or is private and this login may not see it)"]
    lines += [f"  {state:8} {path} ({plan.files[path].size} bytes)" for path, state in plan.states.items()]
    lines += [f"  {'stays':8} {path} (only in the repository)" for path in plan.others]
    return "\n".join([*lines, *plan.differences])


def push(api: HfApi, plan: Plan, tag: str | None = None) -> str:
    """Carry out a plan, then download everything into an empty cache and compare hashes.

    Args:
        api: client of the Hub.
        plan: from `make_plan`.
        tag: name for the published revision.

    Returns:
        The published commit.

    Raises:
        PublishError: before anything is sent, if another revision has the tag; or if downloaded files differ from the
            sent ones, and the revision is then not tagged.
    """
    if tag in plan.tags and (plan.to_send or plan.tags[tag] != plan.commit):
        raise PublishError(f"tag {tag} of {plan.repo_id} is already commit {plan.tags[tag]}; choose another name")
    commit = plan.commit
    created = commit is None
    if created:
        sdk = {"space_sdk": SPACE_SDK} if plan.repo_type == "space" else {}
        api.create_repo(plan.repo_id, repo_type=plan.repo_type, **sdk)  # fails if someone else has made it since
        commit = find_commit(api, plan.repo_id, repo_type=plan.repo_type)
    if plan.to_send:
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=plan.files[path].content) for path in plan.to_send
        ]
        message = f"Publish {', '.join(plan.to_send)}"
        try:
            commit = api.create_commit(
                plan.repo_id,
                operations,
                commit_message=message,
                parent_commit=commit,  # fails if the repository has changed since the plan
                repo_type=plan.repo_type,
            ).oid
        except Exception as error:
            if created:  # not removed, since somebody may have begun to use it
                error.add_note(f"{plan.repo_id} was created and is empty: run this again, or delete it on its page")
            raise
    _verify_upload(api, plan, commit)
    if tag and tag not in plan.tags:
        api.create_tag(plan.repo_id, tag=tag, revision=commit, repo_type=plan.repo_type)
    return commit


def _verify_upload(api: HfApi, plan: Plan, commit: str) -> None:
    with tempfile.TemporaryDirectory() as empty_cache:
        downloaded = api.snapshot_download(
            plan.repo_id,
            revision=commit,
            cache_dir=empty_cache,
            allow_patterns=list(plan.files),
            repo_type=plan.repo_type,
        )
        different = [
            path
            for path, file in plan.files.items()
            if not (Path(downloaded) / path).exists() or hash_file(Path(downloaded) / path).sha256 != file.sha256
        ]
    if different:
        raise PublishError(
            f"{plan.repo_id}@{commit} returns other bytes than were sent for {', '.join(different)}; run this again"
        )


def _show_difference(api: HfApi, repo_id: str, commit: str, path: str, file: LocalFile, repo_type: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        downloaded = Path(api.hf_hub_download(repo_id, path, revision=commit, cache_dir=cache, repo_type=repo_type))
        old = downloaded.read_text(encoding="utf-8", errors="replace")
    new = (
        file.content.decode()
        if isinstance(file.content, bytes)
        else file.content.read_text(encoding="utf-8", errors="replace")
    )
    names = f"{repo_id}/{path}", f"new {path}"
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="", n=1))
    if len(lines) > _SHOWN_LINES:
        lines = [*lines[:_SHOWN_LINES], f"... {len(lines) - _SHOWN_LINES} more lines"]
    return "\n".join(lines)


def _repo_id(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"needs ORG/NAME, got {text!r}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments without the script's name; None for those of the process.

    Returns:
        Exit status: 0 if all went well, else 1.
    """
    parser = argparse.ArgumentParser(
        description="Publish a folder of converted weights as a Hub repository, or hub/space as a Space."
    )
    parser.add_argument("folder", type=Path, help="folder of model.safetensors, config.json and README.md, or a Space")
    parser.add_argument("--repo", type=_repo_id, required=True, metavar="ORG/NAME", help="repository on the Hub")
    parser.add_argument("--space", action="store_true", help="publish a Space")
    parser.add_argument("--push", action="store_true", help="make the changes; without this, only show them")
    parser.add_argument("--revision-tag", metavar="TAG", help="tag for the published revision")
    arguments = parser.parse_args(argv)
    repo_type = "space" if arguments.space else "model"
    try:
        files = read_space(arguments.folder) if arguments.space else read_folder(arguments.folder, arguments.repo)
    except (OSError, ValueError) as error:
        print(f"publish: {escape(str(error), lines=True)}", file=sys.stderr)
        return 1
    api = connect()
    try:
        plan = make_plan(api, files, arguments.repo, repo_type)
        print(escape(describe(plan), lines=True))
        if not arguments.push:
            print("nothing was changed; make the changes with --push")
            return 0
        commit = push(api, plan, arguments.revision_tag)
    except PublishError as error:
        print(f"publish: {escape(str(error), lines=True)}", file=sys.stderr)
        return 1
    except Exception as error:  # the client does not check answers, so a wrong one can raise anything
        said = "; ".join([explain(error, arguments.repo), *getattr(error, "__notes__", ())])
        print(f"publish: {escape(said)}", file=sys.stderr)
        return 1
    print(f"{arguments.repo} has these files at {commit}, downloaded and compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
