"""Completion, in those of the three shells that are installed."""
import shutil
import subprocess

import pytest

from gmnet_timm.cli.completion import candidates
from gmnet_timm.cli.main import build_parser

# The harness completes the words of a line, the last of which may be empty, and prints what is offered.
SHELLS = {
    'bash': '''source <(gmnet-timm completion bash)
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _gmnet_timm; printf '%s\\n' "${COMPREPLY[@]}"''',
    'zsh': '''compdef() { :; }; compadd() { print -rl -- ${(M)found:#$words[CURRENT]*}; }; _files() { print -rl -- *; }
        eval "$(gmnet-timm completion zsh)"; words=("$@"); CURRENT=$#; _gmnet_timm''',
    'fish': 'gmnet-timm completion fish | source; complete -C (string join " " -- $argv)',
}
LINES = {
    'gmnet-timm pu': ['push'],
    'gmnet-timm convert model.pth --dtype ': ['bfloat16', 'float16', 'float32'],
    'gmnet-timm push --cr': ['--create-pr', '--crop-pct'],
    'gmnet-timm recipe --gpus 8 gm': ['gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4'],
    'gmnet-timm info phot': ['photo.jpg'],
}


@pytest.mark.parametrize('shell', SHELLS)
def test_in_a_shell(shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f'{shell} is not installed')
    (tmp_path / 'photo.jpg').touch()
    arguments = {'bash': ['bash', '-c', SHELLS['bash'], 'bash'], 'zsh': ['zsh', '-fc', SHELLS['zsh'], 'zsh'],
                 'fish': ['fish', '--no-config', '-c', SHELLS['fish']]}[shell]
    for line, offered in LINES.items():
        done = subprocess.run([*arguments, *line.split(' ')], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ''
        if offered == ['photo.jpg'] and shell == 'bash':
            offered = ['']  # bash itself then offers files, by `-o default`
        assert [word.split('\t')[0] for word in done.stdout.splitlines()] == offered, line


@pytest.mark.parametrize('words, offered', [
    ([], {'info', 'push', 'freq', 'completion'}),
    (['freq', ''], {'eval', 'layers'}),
    (['push', '--'], {'--help', '--token', '--private'}),
    (['completion', ''], {'bash', 'zsh', 'fish'}),
])
def test_candidates(words, offered):
    found = candidates(build_parser(), words)
    assert offered <= {*found} and '--words' not in found and '-h' not in found


def test_files_are_left_to_the_shell():
    for words in (['verify', ''], ['push', 'run', 'owner/x', '--class-names', ''], ['info', './']):
        assert candidates(build_parser(), words) == []
