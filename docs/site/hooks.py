"""How MkDocs makes a site of documents that are written to be read in the repository.

README, CONTRIBUTING and CHANGELOG become pages. A link to a file that is not part of the site leads to the repository.
"""
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
CODE = re.compile(r'`[^`\n]+`')
SHORT_CODE = re.compile(r'<code>(?=[^<]{1,32}</code>)')
LINK = re.compile(r'(?<=\]\()([^)\s:#]+)(?=[)#])')  # the file in `[text](file#anchor)`; no address, which has a colon


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding='utf-8')))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point the links of a document, which are relative to its place in the repository, to places in the site."""
    sources = {site: source for source, site in PAGES.items()}
    source = sources.get(page.file.src_uri, f'docs/{page.file.src_uri}')

    def target(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[0]))
        if path in PAGES or path.startswith('docs/') and not (ROOT / path).is_dir():
            site = PAGES.get(path, path.removeprefix('docs/'))
            return posixpath.relpath(site, posixpath.dirname(page.file.src_uri) or '.')
        if (ROOT / path).exists():
            return f'{config.repo_url}/blob/main/{path}'
        return match[0]  # MkDocs reports it

    markdown = CODE.sub(lambda match: match[0].replace('\\|', '|'), markdown)  # in tables, GitHub needs the backslash
    return LINK.sub(target, markdown)


def on_page_content(html, page, config, files):
    """Mark short code, which extra.css keeps on one line: a browser would break `--img-size` after its hyphens."""
    return SHORT_CODE.sub('<code class="short">', html)
