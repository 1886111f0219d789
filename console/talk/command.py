"""fastkv-chat: talk with a model. Messages in, answers out, each turn on what is kept of those before it.

Answers, and nothing else, go to stdout; what else there is to say goes to stderr. Heavy imports wait until the
arguments are known to be good.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastkv.cache.catalogue import SETTINGS
from fastkv.cache.setting import settings_of
from fastkv.console.chat_flags import chat_arguments, stop_token_ids
from fastkv.console.load import load_by_flags
from fastkv.console.parser import DONE, check_stdout, complain, flag_of, guarded, say, write_utf8
from fastkv.console.policy_file import read_policy_file
from fastkv.console.policy_text import build_policy
from fastkv.console.prompt import check_texts
from fastkv.console.run_flags import SAMPLING_FLAGS, given_flags
from fastkv.console.talk.answer import answer
from fastkv.console.talk.commands import COMMANDS, policy_told, run_command, told
from fastkv.console.talk.conversation import Conversation
from fastkv.console.talk.flags import NAMED_SETTINGS, build_parser
from fastkv.console.talk.lines import Lines, is_command, lines_of_stdin, read_message
from fastkv.console.tuned import tuned_policy
from fastkv.errors import FastKVError, brief, check_integer, writable

if TYPE_CHECKING:
    from fastkv.cache.policy import Policy
    from fastkv.engine.llm import LLM

NAME = "fastkv-chat"
# Of those that have a flag, the ones that a message can be at odds with; a file or a policy is named by a command.
_AT_WORK = {*SAMPLING_FLAGS, "chat_arg", "stop"}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a fault, 2 a mistake, 130 interrupted.

    From a pipe 1 or 2 also means that a line could not be followed, the last such line of them all.
    """
    return guarded(NAME, lambda: _run(build_parser().parse_args(argv)), NAMED_SETTINGS)


def _run(args: argparse.Namespace) -> int:
    args.chat_arg = chat_arguments(args.chat_arg)
    _check(args)
    check_stdout()
    lines = lines_of_stdin({name: command.takes_file for name, command in COMMANDS.items()})
    talk = _begin(args, lines.on_terminal)
    if not args.quiet:
        there = f"; {told(talk)}" if talk.session.ids else ""
        model = f"{writable(args.model)} on {talk.llm.device} in {talk.llm.model.precision}"
        say(f"{NAME}: {model}, policy {policy_told(talk, every=False)}{there}")
        if lines.on_terminal:
            say("/help lists the commands, Ctrl-D leaves")
    write_utf8(newline="\n")  # newlines stay as the model wrote them
    return _talk(talk, lines)


def _talk(talk: Conversation, lines: Lines) -> int:
    """Follow each message or command. What cannot be followed is said in one line, and the next one is read."""
    status = DONE
    while not talk.over:
        try:
            message = read_message(lines)
            if is_command(message):
                run_command(talk, message)
            elif message.strip():
                answer(talk, message)
        except FastKVError as error:
            status = complain(NAME, error, _AT_WORK)
        except EOFError:
            break
        except KeyboardInterrupt:
            if not talk.on_terminal:
                raise
    return DONE if talk.on_terminal else status


def _check(args: argparse.Namespace) -> None:
    """FastKVError for flags that are of no use, before anything is loaded."""
    if args.threads is not None:
        check_integer("threads", args.threads, 1, 4096)
    check_texts(args, "revision", "system", "stop", "stop_token", "chat_arg")
    for name in ("cache", "policy_file"):
        if getattr(args, name) in ("", "-"):
            raise FastKVError(f"{flag_of(name)} takes the name of a file, not {brief(getattr(args, name))}")
    if args.policy is not None and args.policy_file is not None:
        raise FastKVError("--policy-file names a policy already: leave it or --policy out")
    if args.system is not None and args.cache is not None:
        raise FastKVError("--system begins a conversation, and --cache goes on with one: leave one of them out")


def _begin(args: argparse.Namespace, on_terminal: bool) -> Conversation:
    """Load the model, and begin the conversation or go on with a saved one."""
    from fastkv.engine.sampler import SamplingParams

    params = SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **given_flags(args, SAMPLING_FLAGS))
    policy = _policy(args)
    _check_template(args.model, args.revision)
    llm = _load(args, policy)
    params = dataclasses.replace(params, stop_token_ids=stop_token_ids(llm, args.stop_token))
    session = llm.session(policy, system=args.system)
    talk = Conversation(llm, session, params, args.chat_arg, on_terminal, args.quiet)
    if args.cache is not None:
        talk.load(Path(args.cache))
        if policy is not None:
            talk.set_policy(policy)
    llm.chat(
        [*talk.session.messages, {"role": "user", "content": "?"}], **args.chat_arg
    )  # or the template says why not
    return talk


def _policy(args: argparse.Namespace) -> Policy | None:
    """What the flags ask for; None where they ask for nothing, so that the session's own holds."""
    given = given_flags(args, SETTINGS)
    if args.policy_file is not None:
        named = read_policy_file(Path(args.policy_file))
        tuned_policy(args.model, args.revision, named)
        return named.build(given)
    if args.policy is not None:
        return build_policy(args.policy, given)
    if not given:
        return None
    from fastkv.engine.session import DEFAULT_POLICY

    own = {name: getattr(DEFAULT_POLICY, name) for name in settings_of(type(DEFAULT_POLICY))}
    return build_policy(DEFAULT_POLICY.name, {**own, **given})


def _load(args: argparse.Namespace, policy: Policy | None) -> LLM:
    try:
        return load_by_flags(args, policy)
    except FastKVError as error:
        if args.policy_file is None:
            raise
        raise read_policy_file(Path(args.policy_file)).blamed(error, given_flags(args, SETTINGS)) from None


def _check_template(model: str, revision: str | None) -> None:
    """FastKVError for a model that has no chat template, before its weights are read."""
    from fastkv.models.hub import model_folder
    from fastkv.models.text.chat import Chat
    from fastkv.models.text.special_tokens import SpecialTokens

    folder = model_folder(model, revision)
    if (folder / "config.json").is_file() and not Chat.of(folder, SpecialTokens.read(folder).config).exists:
        raise FastKVError(f"{folder}: no chat template (chat_template.jinja), so no chat; fastkv-run continues texts")


if __name__ == "__main__":
    sys.exit(main())
