"""A hook of MkDocs: pages and files of the repository outside docs/ join the site, where links to them lead.

The site has the repository's layout but for the pages of docs/, which lie at its root. So README.md is the first page,
nothing is copied, and every link works on the site as it does in the repository.

Pictures of results are drawn here, with benchmarks/plots.py, where a page says so:
<!-- drawn from NAME.json NAME.json: what it shows -->
"""

import re
import subprocess
import sys
import tempfile
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

_PICTURE = re.compile(r"<!-- drawn from ([\w. ]+): (.+?) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what joins."""
    root = Path(config.config_file_path).parent
    for pattern in _JOINING:
        for path in sorted(root.glob(pattern)):
            files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    for path, content in _draw_pictures(root):
        files.append(File.generated(config, path, content=content))
    return files


def _draw_pictures(root: Path) -> list[tuple[str, bytes]]:
    """Those that pages ask for: path on the site, content."""
    pages = [
        path.read_text(encoding="utf-8") for path in (*(root / "docs").glob("*.md"), root / "benchmarks/README.md")
    ]
    sources = [
        f"benchmarks/results/{name}" for page in pages for names, _ in _PICTURE.findall(page) for name in names.split()
    ]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "benchmarks/plots.py", *sources, "--output", folder],
            cwd=root,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return [(f"benchmarks/results/{path.name}", path.read_bytes()) for path in sorted(Path(folder).iterdir())]


def _show_picture(match: re.Match[str]) -> str:
    return f"![{match[2]}](../benchmarks/results/{Path(match[1].split()[0]).stem}.svg)"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Wrap each word of code in tables, so that docs/site.css can keep it whole, hyphens and slashes included."""
    return re.sub(r"<t([dh])\b.*?</t\1>", lambda cell: re.sub(r"<code>(.+?)</code>", _wrap_words, cell[0]), html)


def _wrap_words(code: re.Match[str]) -> str:
    return "<code>" + re.sub(r"[^ ]+", r"<span>\g<0></span>", code[1]) + "</code>"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the pictures, and lead links between docs/ and the rest to where the pages are on the site."""
    markdown = _PICTURE.sub(_show_picture, markdown)
    if "/" not in page.file.src_uri and Path(page.file.abs_src_path).parent != Path(config.docs_dir):
        return markdown.replace("](docs/", "](")
    if Path(page.file.abs_src_path).parent == Path(config.docs_dir):
        return re.sub(r"\]\(\.\./", "](", markdown)
    return markdown.replace("](../docs/", "](../")
