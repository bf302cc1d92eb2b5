"""How MkDocs makes a site of documents that are written to be read in the repository.

README, CONTRIBUTING and CHANGELOG become pages. A link to a file that is not part of the site leads to the repository,
whose address pyproject.toml has; where it has none, the link is left out and its text stays.
"""
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
CODE = re.compile(r'`[^`\n]+`')
SHORT_CODE = re.compile(r'<code>(?=[^<]{1,32}</code>)')
# `[text](file#anchor)`, not an address, which has a colon
LINK = re.compile(r'\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\((?P<file>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)')
REPOSITORY = re.search(r"^Repository = '([^']+)'", (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links of a document, which are relative to its place in the repository, to places in the site."""
    sources = {site: source for source, site in PAGES.items()}
    source = sources.get(page.file.src_uri, f'docs/{page.file.src_uri}')

    def link(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match['file']))
        if path in PAGES or path.startswith('docs/') and not (ROOT / path).is_dir():
            site = PAGES.get(path, path.removeprefix('docs/'))
            place = posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or '.')
        elif not (ROOT / path).exists():
            return match[0]  # MkDocs reports it
        elif REPOSITORY:
            place = f'{REPOSITORY[1]}/blob/main/{path}'
        else:
            return match['text']
        return f'[{match["text"]}]({place}{match["anchor"] or ""})'

    markdown = CODE.sub(lambda match: match[0].replace('\\|', '|'), markdown)  # in tables, GitHub needs the backslash
    return LINK.sub(link, markdown)


def on_page_content(html, page, config, files):
    """Mark short code, which extra.css keeps on one line: a browser would break `--img-size` after its hyphens."""
    return SHORT_CODE.sub('<code class="short">', html)
