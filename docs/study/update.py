"""Copy what a study wrote beside this file, and renew the tables in ../study.md: python docs/study/update.py FOLDER"""
import re
import shutil
import sys
from pathlib import Path

from gmnet_timm.frequency.study_report import report_blocks

HERE = Path(__file__).parent
PAGE = HERE.with_suffix('.md')


def main(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in ('.csv', '.json', '.png'):
            shutil.copy(path, HERE)
    blocks = report_blocks(HERE)

    def renew(match: re.Match) -> str:
        return f'<!-- from the files: {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->'

    text = re.sub(r'<!-- from the files: (\w+) -->\n.*?<!-- end -->', renew, PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
