"""Shell completion: scripts that know the verbs, the flags and the values that can be listed.

A script starts no Python when Tab is pressed. It is printed anew by `eval "$(deit-fast completion
bash)"` in the shell's start-up file, and so never older than the package.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from deit_fast.flags import Flag


@dataclass(frozen=True)
class Verb:
    """What can follow a verb.

    Attributes:
        purpose: one line.
        values: of its first positional argument; empty where they cannot be listed.
    """

    purpose: str
    flags: tuple[Flag, ...]
    values: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """All flags, `--help` and what turns switches off included."""
        words = [flag.name for flag in self.flags]
        words += [flag.switch_off for flag in self.flags if flag.is_switch and flag.default is True]
        return [*sorted(words), "--help"]


def script(shell: str, verbs: Mapping[str, Verb]) -> str:
    """The text of `deit-fast completion SHELL`.

    Args:
        shell: bash, zsh or fish.
        verbs: by name, of one or two words.
    """
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](verbs)


def _groups(verbs: Mapping[str, Verb]) -> dict[str, list[str]]:
    """First words of all verbs, each with its second words."""
    groups: dict[str, list[str]] = {}
    for verb in verbs:
        first, _, second = verb.partition(" ")
        groups.setdefault(first, []).extend([second] if second else [])
    return groups


def _bash(verbs: Mapping[str, Verb]) -> str:
    groups = _groups(verbs)
    pairs = {first: seconds for first, seconds in groups.items() if seconds}
    members = "\n".join(
        f"        {first}) words={shlex.quote(' '.join(seconds))} ;;"
        for first, seconds in pairs.items()
    )
    flags = "\n".join(
        f"        {shlex.quote(name)}) flags={shlex.quote(' '.join(verb.words()))}; "
        f"words={shlex.quote(' '.join(verb.values))} ;;"
        for name, verb in verbs.items()
    )
    values = []
    for name, verb in verbs.items():
        for flag in verb.flags:
            pattern = shlex.quote(f"{name} {flag.name}")
            if flag.choices:
                values.append(f"        {pattern}) words={shlex.quote(' '.join(flag.choices))} ;;")
    listed = "\n".join(values)
    first = shlex.quote(" ".join([*groups, "--help", "--version"]))
    return f"""\
# Completion for bash. Put this into ~/.bashrc:  eval "$(deit-fast completion bash)"
_deit_fast() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    local verb="${{COMP_WORDS[1]}}" first=2 words="" flags=""
    if [[ "$cur" == "=" ]]; then  # bash splits --flag=value into three words
        cur=""
    elif [[ "$prev" == "=" ]]; then
        prev="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    prev="${{prev//_/-}}"
    COMPREPLY=()
    if [[ "$COMP_CWORD" -eq 1 ]]; then
        COMPREPLY=( $(compgen -W {first} -- "$cur") )
        return
    fi
    case "$verb" in
{members}
    esac
    if [[ -n "$words" ]]; then
        if [[ "$COMP_CWORD" -eq 2 ]]; then
            COMPREPLY=( $(compgen -W "$words" -- "$cur") )
            return
        fi
        verb="$verb ${{COMP_WORDS[2]}}"
        first=3
        words=""
    fi
    case "$verb" in
{flags}
    esac
    if [[ "$cur" == -* ]]; then
        COMPREPLY=( $(compgen -W "$flags" -- "$cur") )
        return
    fi
    if [[ "$COMP_CWORD" -ne "$first" ]]; then
        words=""
    fi
    case "$verb $prev" in
{listed}
    esac
    if [[ -n "$words" ]]; then
        COMPREPLY=( $(compgen -W "$words" -- "$cur") )
    fi  # else the shell completes file names
}}
complete -o default -F _deit_fast deit-fast"""


def _zsh(verbs: Mapping[str, Verb]) -> str:
    script = _bash(verbs).split("\n", 1)[1]
    return f"""\
# Completion for zsh. Put this into ~/.zshrc:  eval "$(deit-fast completion zsh)"
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
{script}"""


def _fish(verbs: Mapping[str, Verb]) -> str:
    lines = [
        "# Completion for fish. Put this into ~/.config/fish/config.fish:",
        "#   deit-fast completion fish | source",
    ]
    for first, seconds in _groups(verbs).items():
        purpose = verbs[first].purpose if not seconds else f"{first}: {', '.join(seconds)}"
        lines.append(_fish_line("__fish_use_subcommand", f"-f -a {first}", purpose))
        for second in seconds:
            condition = f"__fish_seen_subcommand_from {first}; and not __fish_seen_subcommand_from"
            lines.append(
                _fish_line(
                    f"{condition} {' '.join(seconds)}", f"-f -a {second}",
                    verbs[f"{first} {second}"].purpose,
                )
            )  # fmt: skip
    for name, verb in verbs.items():
        condition = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        if verb.values:
            lines.append(_fish_line(condition, f"-f -a {shlex.quote(' '.join(verb.values))}", ""))
        for flag in verb.flags:
            takes = "" if flag.is_switch else "-r"
            if flag.choices:
                takes = f"-x -a {shlex.quote(' '.join(flag.choices))}"
            text = flag.text.partition("\n")[0]
            lines.append(_fish_line(condition, f"-l {flag.name[2:]} {takes}".rstrip(), text))
    return "\n".join(lines)


def _fish_line(condition: str, rest: str, text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"complete -c deit-fast -n '{condition}' {rest} -d '{quoted}'"
