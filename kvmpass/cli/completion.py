"""``kvmpass completion``, and the requests of the shells' completion functions."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, ClassVar

import click
from click import shell_completion
from click.shell_completion import CompletionItem, ShellComplete

from kvmpass.cli.main import COMPLETE, kvmpass

if TYPE_CHECKING:  # generic since click 8.4 only
    _Items = list[CompletionItem[str]]
else:
    _Items = list

PROGRAM = "kvmpass"

# Readline splits words at colons, and so would split every address. So the function splits the line at blanks, and
# removes everything up to the last colon from its candidates. A list of candidates (the second Tab: COMP_TYPE 63,
# bash(1)) shows the help beside each; the help must never be inserted in the line.
# Bash completes files itself (compopt) only for a function without candidates: beside guests, the function adds them.
_BASH = """\
%(complete_func)s() {
    local typed="${COMP_LINE:0:COMP_POINT}" cut="" path="" files="" type value help answer
    COMPREPLY=()
    answer=$(env COMP_WORDS="$typed" %(complete_var)s=bash_complete "$1" 2>/dev/null) || return 0
    [[ "$COMP_WORDBREAKS" == *:* ]] && cut="${typed##*[[:blank:]]}"
    if [[ "$cut" == *:* ]]; then cut="${cut%%:*}:"; else cut=""; fi
    while IFS=$'\t' read -r type value help; do
        case "$type" in
            dir) compopt -o dirnames ;;
            file)
                compopt -o default
                path="$value" files=1
                ;;
            plain)
                if [[ "$value" == */ ]]; then compopt -o nospace; fi
                value="${value#"$cut"}"
                if [[ "$COMP_TYPE" == 63 && -n "$help" ]]; then value="$value  $help"; fi
                COMPREPLY+=("$value")
                ;;
        esac
    done <<< "$answer"
    if [[ -n "$files" ]] && (( ${#COMPREPLY[@]} )); then
        while IFS= read -r value; do
            if [[ -d "$value" ]]; then value="$value/"; fi
            printf -v value %%q "$value"
            COMPREPLY+=("${value#"$cut"}")
        done < <(compgen -f -- "$path")
    fi
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Shell(ShellComplete):
    """Completes files after ``--``, where a command for the guest is, and before it what click does."""

    def get_completions(self, args: list[str], incomplete: str) -> _Items:
        if "--" in args:
            return [CompletionItem(incomplete, type="file")]
        return super().get_completions(args, incomplete)


class Bash(_Shell):
    """Completes addresses, whose colons click's own function does not support. Needs bash 4.4."""

    name: ClassVar[str] = "bash"
    source_template: ClassVar[str] = _BASH
    _widest = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the line up to the cursor; its last word, which may be empty, is the one to complete."""
        line = os.environ.get("COMP_WORDS", "")
        words = shell_completion.split_arg_string(line)
        if line[-1:].isspace():
            words.append("")
        return words[1:-1], words[-1] if len(words) > 1 else ""

    def get_completions(self, args: list[str], incomplete: str) -> _Items:
        """Return click's completions before ``--``, and note the longest for the column of help."""
        items = super().get_completions(args, incomplete)
        self._widest = max((len(str(item.value)) for item in items), default=0)
        return items

    def format_completion(self, item: CompletionItem) -> str:
        """Return click's line for an item, with the help padded to a column."""
        value = str(item.value)
        pad = " " * (self._widest - len(value)) if item.help else ""
        return "\t".join((item.type, value, pad + " ".join((item.help or "").split())))


class Zsh(_Shell, shell_completion.ZshComplete):
    """Completion for zsh."""


class Fish(_Shell, shell_completion.FishComplete):
    """Completion for fish."""

    # click's own script ends the help at its first comma.
    source_template: ClassVar[str] = shell_completion.FishComplete.source_template.replace(
        'string split ","', 'string split -m 1 ","'
    )


SHELLS: dict[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}


def answer(command: click.Command, request: str) -> int:
    """Print the candidates that a completion function requests through its environment; return an exit status.

    ``request`` is ``bash_complete`` (or zsh, fish) for candidates, ``bash_source`` for the script. Raises nothing.
    """
    shell, _, instruction = request.partition("_")
    if shell not in SHELLS or instruction not in ("complete", "source"):
        return 1
    complete = SHELLS[shell](command, {}, PROGRAM, COMPLETE)
    try:
        click.echo(complete.complete() if instruction == "complete" else complete.source())
        sys.stdout.flush()
    except (
        Exception,
        KeyboardInterrupt,
    ):  # the user is typing: an error would appear in the middle of the line
        return 1
    return 0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the completion script for SHELL.

    It completes commands, options, devices and the names of guests. Addresses are completed with the names of their
    devices. zsh and fish show the name beside each candidate, bash in its list of candidates.

    \b
    For each new shell:
      bash  kvmpass completion bash > ~/.local/share/bash-completion/completions/kvmpass
      zsh   kvmpass completion zsh > "${fpath[1]}/_kvmpass"
      fish  kvmpass completion fish > ~/.config/fish/completions/kvmpass.fish

    \b
    For this shell:
      bash  eval "$(kvmpass completion bash)"
      zsh   eval "$(kvmpass completion zsh)"
      fish  kvmpass completion fish | source

    Needs bash 4.4; the first form also needs the package bash-completion.
    """
    click.echo(SHELLS[shell](kvmpass, {}, PROGRAM, COMPLETE).source(), nl=False)
    return 0
