"""Write the manual pages and the completions of `cortex` and `neuron` from their argument parsers.

`python packaging/command_line.py` writes them into packaging/man and packaging/completions; a test makes them again
and compares. Sections that a parser does not have (files, environment, exit status) are here.
"""

import argparse
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass

import cortex.cli
import neuron.cli

HERE = pathlib.Path(__file__).parent


@dataclass(frozen=True)
class Program:
    """A command and what its manual has beside its arguments. ``sections`` are in roff."""

    parser: argparse.ArgumentParser
    summary: str
    description: str
    sections: dict[str, str]
    see_also: str


PROGRAMS = {
    "cortex": Program(
        cortex.cli.command_line(),
        "gateway in front of hosts that run open-weight models",
        "runs the gateway, and shows and changes one that is running. It serves the APIs of OpenAI and Anthropic, "
        "forwards requests to the neurons of its configuration, and has them load models.",
        {
            "FILES": ".TP\n.I /etc/cortex/cortex.toml\nThe configuration, unless\n.B \\-\\-config\nor\n"
            ".I ./cortex.toml\nis given.\n.TP\n.I /etc/cortex/models.toml\nThe catalogue of models.\n.TP\n"
            ".I /etc/cortex/keys.toml\nThe keys of clients, if any.\n.TP\n.I /var/lib/cortex/responses.db\n"
            "Responses that clients may continue.",
            "ENVIRONMENT": ".TP\n.B CORTEX_CONFIG\nPath of the configuration.\n.TP\n.B CORTEX_KEY\n"
            "An administrator's key, for commands to a running gateway.\n.TP\n.B CORTEX_TABLE__KEY\n"
            "Sets a key of the configuration, as in\n.BR CORTEX_GATEWAY__LISTEN=0.0.0.0:31313 .",
            "SIGNALS": ".TP\n.B SIGTERM\nStop accepting, let running answers finish, and exit.\n.TP\n.B SIGHUP\n"
            "Read the configuration again.",
            "EXIT STATUS": ".TP\n.B 0\nSuccess.\n.TP\n.B 1\nThe gateway cannot be reached, or refuses.\n.TP\n"
            ".B 2\nThe configuration or the command line is wrong.",
        },
        ".BR neuron (1)",
    ),
    "neuron": Program(
        neuron.cli.parser(),
        "inference daemon of one host",
        "loads open-weight models onto the devices of its host and serves inference over HTTP, in the dialects of "
        "OpenAI and Anthropic. Gateways request the loading of models; it also works without a gateway.",
        {
            "FILES": ".TP\n.I /etc/neuron/neuron.toml\nThe configuration; the daemon also runs without one.\n.TP\n"
            ".I /var/cache/neuron\nDownloaded weights and compiled kernels of the service.",
            "ENVIRONMENT": ".TP\n.B NEURON_CONFIG\nPath of the configuration.\n.TP\n"
            ".B NEURON_TABLE__KEY\nSets a key of the configuration, as in\n"
            ".BR NEURON_DAEMON__LISTEN=0.0.0.0:13131 .",
            "SIGNALS": ".TP\n.B SIGTERM\nRefuse new requests, let running answers finish, and exit.",
            "EXIT STATUS": ".TP\n.B 0\nStopped by a signal.\n.TP\n"
            ".B 2\nThe configuration or the command line is wrong.",
        },
        ".BR cortex (1)",
    ),
}


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """Return the commands of a parser, each with its one line of help."""
    found: dict[str, tuple[argparse.ArgumentParser, str]] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            found |= {name: (sub, helps[name]) for name, sub in action.choices.items()}
    return found


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Iterate over a parser's options, in their order."""
    for action in parser._actions:
        if action.option_strings:
            yield action


def value_of(action: argparse.Action) -> str:
    """Return what an option's value is called; empty if it takes none."""
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    metavar = action.metavar if isinstance(action.metavar, str) else None
    return metavar or action.dest.upper()


def takes_file(action: argparse.Action) -> bool:
    """Return whether an option's value is the path of a file."""
    return value_of(action) == "FILE" or action.type is pathlib.Path


# ------------------------------------------------------------------ manual pages


def roff(text: str) -> str:
    """Return text as roff shows it."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def manual(name: str, program: Program) -> str:
    """Return the manual page of a command."""
    lines = [
        f'.TH {name.upper()} 1 2026-11-25 "helexa" "User Commands"',
        ".SH NAME",
        f"{name} \\- {roff(program.summary)}",
        ".SH SYNOPSIS",
        *_synopsis(name, program.parser),
        ".SH DESCRIPTION",
        f".B {name}",
        roff(program.description),
        ".SH OPTIONS",
        *_option_lines(program.parser),
    ]
    commands = subcommands(program.parser)
    if commands:
        lines.append(".SH COMMANDS")
        for command, (parser, line) in commands.items():
            arguments = [action for action in parser._actions if not action.option_strings]
            given = "".join(f" \\fI{roff(action.dest.upper())}\\fR" for action in arguments)
            lines += [f'.SS "{name} {command}{given}"', _sentence(line), *_option_lines(parser, without=("--help",))]
    for title, text in program.sections.items():
        lines += [f'.SH "{title}"' if " " in title else f".SH {title}", text]
    lines += [".SH SEE ALSO", program.see_also]
    return "\n".join(lines) + "\n"


def _synopsis(name: str, parser: argparse.ArgumentParser) -> list[str]:
    if subcommands(parser):
        return [f".B {name}", ".I COMMAND", ".RI [ OPTION \\&...]"]
    return [f".B {name}", ".RI [ OPTION \\&...]"]


def _option_lines(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> Iterator[str]:
    for action in options(parser):
        if not set(without) & set(action.option_strings):
            value = value_of(action)
            names = ", ".join(f"\\fB{roff(option)}\\fR" for option in action.option_strings)
            shown = f" \\fI{roff(value)}\\fR" if value else ""
            yield ".TP"
            yield f"{names}{f' [{shown.strip()}]' if action.nargs == '?' else shown}"
            yield _sentence(action.help or "")


def _sentence(text: str) -> str:
    first, _, _ = text.partition(" ")
    if "." not in first:  # the name of a file stays as it is
        text = text[:1].upper() + text[1:]
    return roff(text) + ("" if text.endswith(".") else ".")


# ------------------------------------------------------------------ completions


def bash(name: str, program: Program) -> str:
    """Return the completion for bash."""
    parsers = {"": program.parser} | {key: value[0] for key, value in subcommands(program.parser).items()}
    words = {
        command: " ".join(option for action in options(parser) for option in action.option_strings)
        for command, parser in parsers.items()
    }
    files: dict[str, None] = {}
    choices: dict[str, str] = {}
    plain: dict[str, None] = {}
    for parser in parsers.values():
        for action in options(parser):
            for option in action.option_strings:
                if takes_file(action):
                    files[option] = None
                elif action.choices is not None:
                    choices[option] = " ".join(map(str, action.choices))
                elif value_of(action) and action.nargs != "?":
                    plain[option] = None
    lines = [f"# bash completion for {name}; written by packaging/command_line.py", f"_{name}() {{"]
    lines += ['    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}" command="" word']
    lines += ["    COMPREPLY=()", '    case "$previous" in']
    if files:
        lines.append(f'        {"|".join(files)}) mapfile -t COMPREPLY < <(compgen -f -- "$current"); return ;;')
    for option, values in choices.items():
        lines.append(f"        {option}) mapfile -t COMPREPLY < <(compgen -W '{values}' -- \"$current\"); return ;;")
    if plain:
        lines.append(f"        {'|'.join(plain)}) return ;;")
    lines.append("    esac")
    commands = [command for command in words if command]
    if commands:
        lines += [
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            f'        case "$word" in {"|".join(commands)}) command="$word"; break ;; esac',
            "    done",
        ]
    lines.append('    case "$command" in')
    for command, known in words.items():
        extra = " ".join(commands) + " " if command == "" and commands else ""
        lines.append(
            f"        {command or repr('')}) mapfile -t COMPREPLY < <(compgen -W '{extra}{known}' -- \"$current\") ;;"
        )
    lines += ["    esac", "}", f"complete -o filenames -F _{name} {name}"]
    return "\n".join(lines) + "\n"


def zsh(name: str, program: Program) -> str:
    """Return the completion for zsh."""
    commands = subcommands(program.parser)
    lines = [f"#compdef {name}", "# written by packaging/command_line.py", "", f"_{name}() {{"]
    if not commands:
        lines += ["    _arguments \\", *_zsh_arguments(program.parser, "        ")]
    else:
        lines += ["    local context state line", "    _arguments -C \\"]
        lines += [f"{row} \\" for row in _zsh_arguments(program.parser, "        ", keep_last=True)]
        lines += ["        '1:command:->command' \\", "        '*::argument:->arguments'", "    case $state in"]
        lines += ["        command)", "            local -a commands=("]
        lines += [f"                {_quoted(f'{command}:{line}')}" for command, (_, line) in commands.items()]
        lines += ["            )", "            _describe command commands ;;", "        arguments)"]
        lines += ["            case $line[1] in"]
        for command, (parser, _) in commands.items():
            lines += [f"                {command})", "                    _arguments \\"]
            lines += [*_zsh_arguments(parser, "                        "), "                    ;;"]
        lines += ["            esac ;;", "    esac"]
    lines += ["}", "", f'_{name} "$@"']
    return "\n".join(lines) + "\n"


def _zsh_arguments(parser: argparse.ArgumentParser, indent: str, *, keep_last: bool = False) -> list[str]:
    rows = []
    for action in options(parser):
        help_text = (action.help or "").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        value = value_of(action)
        if takes_file(action):
            follows = ":file:_files"
        elif action.choices is not None:
            follows = f":value:({' '.join(map(str, action.choices))})"
        else:
            follows = f"{':' if action.nargs == '?' else ''}:{value.lower().replace(':', ' ')}: " if value else ""
        rows += [_quoted(f"{option}[{help_text}]{follows}") for option in action.option_strings]
    for number, action in enumerate((action for action in parser._actions if not action.option_strings), 1):
        if not isinstance(action, argparse._SubParsersAction):
            rows.append(_quoted(f"{number}:{action.dest}: "))
    ends = [" \\"] * (len(rows) - 1) + [""]
    return [f"{indent}{row}{'' if keep_last else end}" for row, end in zip(rows, ends, strict=True)]


def fish(name: str, program: Program) -> str:
    """Return the completion for fish."""
    commands = subcommands(program.parser)
    lines = [f"# fish completion for {name}; written by packaging/command_line.py", f"complete -c {name} -f"]
    for command, (_, line) in commands.items():
        lines.append(f"complete -c {name} -n __fish_use_subcommand -a {command} -d {_quoted(line)}")
    parsers = {"__fish_use_subcommand" if commands else "": program.parser}
    parsers |= {f"__fish_seen_subcommand_from {command}": parser for command, (parser, _) in commands.items()}
    for condition, parser in parsers.items():
        for action in options(parser):
            names = " ".join(
                f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
                for option in action.option_strings
            )
            if takes_file(action):
                value = " -r -F"
            elif action.choices is not None:
                value = f" -x -a {_quoted(' '.join(map(str, action.choices)))}"
            else:
                value = " -x" if value_of(action) and action.nargs != "?" else ""
            where = f" -n {_quoted(condition)}" if condition else ""
            help_text = action.help or ""
            lines.append(f"complete -c {name}{where} {names}{value} -d {_quoted(help_text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def documents() -> dict[str, str]:
    """Return every file by its path in packaging/."""
    found: dict[str, str] = {}
    for name, program in PROGRAMS.items():
        found[f"man/{name}.1"] = manual(name, program)
        found[f"completions/{name}.bash"] = bash(name, program)
        found[f"completions/_{name}"] = zsh(name, program)
        found[f"completions/{name}.fish"] = fish(name, program)
    return found


if __name__ == "__main__":
    for path, text in documents().items():
        (HERE / path).write_text(text)
