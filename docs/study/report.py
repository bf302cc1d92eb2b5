"""Writes the tables of docs/study.md from the CSV files beside this one: python -m docs.study.report [FOLDER]

What a study wrote into FOLDER is copied here first. A section is what stands between `<!-- study: NAME -->` and
`<!-- study: end -->`.
"""
import re
import shutil
import sys
from pathlib import Path

from gmnet_timm.files import write_text
from gmnet_timm.frequency.study_report import report_blocks

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / 'study.md'
SECTION = re.compile(r'(<!-- study: ([\w-]+) -->\n).*?(<!-- study: end -->)', re.DOTALL)


def rendered(text: str) -> str:
    """A document with its sections written anew."""
    blocks = report_blocks(HERE)
    return SECTION.sub(lambda match: f'{match[1]}{blocks[match[2]]}\n{match[3]}', text)


if __name__ == '__main__':
    for folder in map(Path, sys.argv[1:]):
        for path in folder.iterdir():
            if path.suffix in ('.csv', '.json', '.png'):
                shutil.copy(path, HERE)
    write_text(DOCUMENT, rendered(DOCUMENT.read_text(encoding='utf-8')))
