"""What the parser of timm's train.py makes of a YAML file. It runs in a process of its own, up to its `main`."""
import json
import subprocess
import sys
from pathlib import Path

_READ = '''
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
parser = runpy.run_path(sys.argv[1], run_name='train')['parser']
print(json.dumps({a.dest: getattr(a.type, '__name__', None) for a in parser._actions}))
'''


def problems_of(config: dict, script: Path) -> list[str]:
    """Entries that are not arguments of train.py, and numbers that YAML has read as text."""
    done = subprocess.run([sys.executable, '-c', _READ, str(script)], capture_output=True, text=True, check=True)
    types = json.loads(done.stdout.splitlines()[-1])
    unknown = [f'{key} is not an argument' for key in config if key not in types]
    return unknown + [f'{key} is text' for key, value in config.items()
                      if types.get(key) in ('int', 'float') and isinstance(value, str)]
