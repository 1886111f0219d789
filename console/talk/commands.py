"""The commands of a conversation: lines that begin with a slash. A table of them, and what each does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkv.console.parser import say
from fastkv.console.policy_text import build_policy, read_settings, write_settings
from fastkv.console.summary import session_figures
from fastkv.console.talk.conversation import Conversation
from fastkv.console.words import counted
from fastkv.errors import FastKVError, brief


@dataclass(frozen=True)
class Command:
    """A line `name argument`. argument: what is to follow the name, "" for nothing, in brackets where it may be left
    out.
    """

    name: str
    argument: str
    help: str
    run: Callable[[Conversation, str], None]

    @property
    def takes_file(self) -> bool:
        """Whether the name of a file follows."""
        return self.argument in ("PATH", "FILE")


def run_command(talk: Conversation, line: str) -> None:
    """Do what a line says. Raises FastKVError, in one line, for what cannot be done; the conversation is as it was."""
    name, *rest = line.split(maxsplit=1)
    argument = rest[0].strip() if rest else ""
    command = COMMANDS.get(name)
    if command is None:
        raise FastKVError(
            f"no command {brief(name, 40)}; /help lists them. A message may begin with a slash after a space"
        )
    if argument and not command.argument:
        raise FastKVError(f"{name} takes nothing after it, not {brief(argument, 40)}")
    if not argument and command.argument and not command.argument.startswith("["):
        raise FastKVError(f"{name} {command.argument}: {command.argument} is missing")
    command.run(talk, argument)


def policy_told(talk: Conversation, every: bool = True) -> str:
    """The policy in the words that /policy takes: with every setting, or with those that are not as usual."""
    policy = talk.session.policy
    declared: tuple[Any, ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    usual = {each.name: each.default for each in declared}
    settings = policy.settings(talk.llm.config.n_layers)
    told = {
        name: value
        for name, value in settings.items()
        if value is not None and (every or getattr(policy, name) != usual.get(name))
    }
    return write_settings(policy.name, told) if told else policy.name


def _file(talk: Conversation, argument: str) -> None:
    path = _path(argument)
    text = talk.read_file(path)
    go = "goes" if len(text) == 1 else "go"
    say(f"{path}: {counted(len(text), 'character')} {go} along with the next message")


def _undo(talk: Conversation, argument: str) -> None:
    if talk.files:
        name, _ = talk.files.pop()
        say(f"{name}: is left out again")
        return
    if not talk.session.messages or talk.session.messages[-1]["role"] != "assistant":
        raise FastKVError("there is no message to take back")
    message = talk.session.messages[-2]["content"]
    if not talk.can_undo:
        raise FastKVError("what was loaded cannot be taken back, only what was said since; /load FILE loads another")
    talk.session.undo()
    talk.last = None
    say(f"taken back: {brief(message, 60)} and its answer")


def _save(talk: Conversation, argument: str) -> None:
    path = _path(argument)
    talk.session.save(path)
    say(f"{path}: {told(talk)}")


def _load(talk: Conversation, argument: str) -> None:
    path = _path(argument)
    talk.load(path)
    say(f"{path}: {told(talk)}, policy {policy_told(talk, every=False)}")


def _policy(talk: Conversation, argument: str) -> None:
    if argument:
        talk.set_policy(build_policy(*read_settings(argument)))
    later = " from now on; what was read before stays as it was kept" if argument and talk.session.ids else ""
    say(f"policy {policy_told(talk)}{later}")


def _stats(talk: Conversation, argument: str) -> None:
    for label, value in session_figures(talk.session, talk.llm.config, talk.last):
        say(f"{label:<12} {value}")


def _help(talk: Conversation, argument: str) -> None:
    for command in COMMANDS.values():
        say(f"{command.name + ' ' + command.argument:<37} {command.help}")
    say("A line that ends with a backslash goes on in the next one. Ctrl-C stops an answer, or clears the line;")
    say("Ctrl-D leaves. A message that begins with a slash is written with a space before it.")


def _exit(talk: Conversation, argument: str) -> None:
    talk.over = True


def told(talk: Conversation) -> str:
    """How long the conversation is."""
    n_messages = sum(each["role"] == "user" for each in talk.session.messages)
    return f"{counted(n_messages, 'message')}, {counted(len(talk.session.ids), 'token')}"


def _path(argument: str) -> Path:
    if "\0" in argument:
        raise FastKVError(f"no file can be named {brief(argument, 40)}")
    try:
        return Path(argument).expanduser()
    except RuntimeError:  # of a user that is not there
        return Path(argument)


COMMANDS = {
    command.name: command
    for command in (
        Command("/file", "PATH", "the file's text goes along with the next message; the policy chooses", _file),
        Command("/undo", "", "take back the file that waits, or the last message and its answer", _undo),
        Command("/save", "FILE", "write the conversation and what is kept of it", _save),
        Command("/load", "FILE", "go on with what /save wrote, in place of this conversation", _load),
        Command("/policy", "[NAME:setting=value,…]", "show the policy, or take another for what is read next", _policy),
        Command("/stats", "", "tokens, kept entries, bytes, times", _stats),
        Command("/help", "", "these lines", _help),
        Command("/exit", "", "leave", _exit),
    )
}
