"""A hook of MkDocs: pages and files of the repository outside docs/ join the site, where links to them lead.

The site has the repository's layout but for the pages of docs/, which lie at its root. So README.md is the first page,
nothing is copied, and every link works on the site as it does in the repository.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_JOINING = (  # patterns, from the root of the repository
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"),
    *("benchmarks/README.md", "benchmarks/results/*.svg", "benchmarks/results/*.md"),
    *(
        "hub/README.md",
        "notebooks/*.ipynb",
        "recipes/*.yaml",
        "tests/ACCEPTANCE.md",
        "timm_tresnet/recompute/policy.py",
        "timm_tresnet/recompute/compiled.py",
    ),
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what joins."""
    root = Path(config.config_file_path).parent
    for pattern in _JOINING:
        for path in sorted(root.glob(pattern)):
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between docs/ and the rest to where the pages are on the site."""
    if page.file.src_uri == "README.md":
        return markdown.replace("](docs/", "](")
    if Path(page.file.abs_src_path).parent == Path(config.docs_dir):
        return re.sub(r"\]\(\.\./", "](", markdown)
    return markdown.replace("](../docs/", "](../")
