"""What the site has beyond the pages in this folder: the README, the table of recipes, security.

Files outside this folder are not part of the site, so links to them become plain names.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ensemble_kit.data.published import PUBLISHED
from ensemble_kit.networks.catalogue import list_recipes

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(
    r"\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])+)\]\((?!https?://|#|mailto:)([^)#]*)(#[^)]*)?\)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from something else."""
    for name, text in (
        ("index.md", (ROOT / "README.md").read_text(encoding="utf-8")),
        ("reference/security.md", (ROOT / "SECURITY.md").read_text(encoding="utf-8")),
        ("reference/recipes.md", _recipes()),
    ):
        content = _without_outside(text, name, ROOT)
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: object, **_: object) -> str:
    """Unlink what lies outside the site."""
    uri = page.file.src_uri  # type: ignore[attr-defined]
    return _without_outside(markdown, uri, (ROOT / "docs" / uri).parent)


def _without_outside(text: str, uri: str, folder: Path) -> str:
    """Return a page's text, which lay in ``folder``, without links to what the site lacks."""

    def replaced(match: re.Match[str]) -> str:
        name = LINK.sub(replaced, match[1])  # of a picture that is a link too
        target, anchor = match[2], match[3] or ""
        if (inside := target.removeprefix("docs/")) != target:  # from the README
            return f"[{name}]({'../' * uri.count('/')}{inside}{anchor})"
        found = (folder / target).resolve()
        is_inside = found.is_relative_to(ROOT / "docs")
        return match[0] if is_inside or not target else name

    return LINK.sub(replaced, text)


def _recipes() -> str:
    rows = [
        f"| `{entry.recipe.name}` | {entry.recipe.title} | {entry.recipe.source.paper} "
        f"| {entry.size.parameters:,} |"
        for entry in list_recipes(PUBLISHED["youtube8m-2018"])
        if entry.recipe.source is not None
    ]
    head = (
        "# Recipes\n\nEvery recipe that ships with the kit, its source, and its parameters on "
        "YouTube-8M of 2018. `ensemble-kit recipes show NAME` prints one.\n\n"
        "| recipe | title | source | parameters |\n|---|---|---|---:|\n"
    )
    return head + "\n".join(rows) + "\n"
