"""`gmnet-timm completion`: what Tab offers in bash, zsh and fish.

The scripts ask the program itself, so they never go out of date. It answers from its parser, without torch and timm.
Where it offers nothing, the shell offers files.
"""
import argparse
import sys

import gmnet_timm

SCRIPTS = {
    'bash': '''# bash: gmnet-timm completion bash > ~/.local/share/bash-completion/completions/gmnet-timm
_gmnet_timm() {
    local IFS=$'\\n'
    COMPREPLY=($(printf '%s\\n' "${COMP_WORDS[@]:1:COMP_CWORD}" | gmnet-timm completion bash --words))
}
complete -o default -F _gmnet_timm gmnet-timm
''',
    'zsh': '''#compdef gmnet-timm
# zsh: gmnet-timm completion zsh > FOLDER/_gmnet_timm, where FOLDER is one of $fpath
_gmnet_timm() {
    local -a found=(${(f)"$(printf '%s\\n' "${(@)words[2,CURRENT]}" | gmnet-timm completion zsh --words)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
if [ "$funcstack[1]" = _gmnet_timm ]; then _gmnet_timm "$@"; else compdef _gmnet_timm gmnet-timm; fi
''',
    'fish': '''# fish: gmnet-timm completion fish > ~/.config/fish/completions/gmnet-timm.fish
function __gmnet_timm
    set -l words (commandline -opc) (commandline -ct)
    set -l found (printf '%s\\n' $words[2..] | gmnet-timm completion fish --words)
    if set -q found[1]
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c gmnet-timm -f -a '(__gmnet_timm)'
''',
}


def add_commands(commands) -> None:
    """Declare the command on the sub-parsers of `gmnet-timm`."""
    parser = commands.add_parser(
        'completion', help='print a script for bash, zsh or fish that completes gmnet-timm on Tab',
        description='Print a script that completes commands, options and model names on Tab. Its first lines say where '
        'to save it. For the current shell alone: source <(gmnet-timm completion bash)')
    parser.add_argument('shell', choices=tuple(SCRIPTS))
    parser.add_argument('--words', action='store_true', help=argparse.SUPPRESS)  # on standard input, one per line
    parser.set_defaults(run=_run_completion)


def _run_completion(args: argparse.Namespace) -> None:
    from gmnet_timm.cli.main import build_parser  # which imports this module

    if args.words:
        for candidate in candidates(build_parser(), sys.stdin.read().split('\n')[:-1]):
            print(candidate)
    else:
        print(SCRIPTS[args.shell], end='')


def candidates(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """What the last word can become.

    Args:
        parser: Parser of the program.
        words: Words after its name. The last is the one to complete, '' for a new one.

    Returns:
        Commands, options, choices or model names; none where anything may stand, such as a file.
    """
    *before, last = words or ['']
    for word in before:
        parser = _commands(parser).get(word, parser)
    option = parser._option_string_actions.get(before[-1]) if before else None
    if option is not None and option.nargs != 0:
        found = _values(option)
    elif last.startswith('-'):
        found = [name for name, action in parser._option_string_actions.items() if action.help != argparse.SUPPRESS]
    else:
        found = [value for action in parser._get_positional_actions() for value in _values(action)]
    return sorted(value for value in found if value.startswith(last))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)), {})


def _values(action: argparse.Action) -> list[str]:
    if action.dest in ('model', 'models'):
        return [name for name in gmnet_timm.__all__ if name.startswith('gmnet_')]
    return [str(value) for value in action.choices or ()]
