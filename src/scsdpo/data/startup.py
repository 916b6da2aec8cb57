"""Checks of tokenizer, templates and data at the start of a run, before weights are loaded."""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from datetime import date
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from scsdpo.data._base import CHECK_AHEAD, Source, source_key
from scsdpo.data.golds import refuse_unmet
from scsdpo.data.rendered import rendered
from scsdpo.errors import blamed_on
from scsdpo.policy.chat import Chat
from scsdpo.teacher import Teacher
from scsdpo.types import Judged, Prompt, Responses, Verdict

SHARED_AHEAD = 1_000
"""Number of questions of a stream or large source that are compared with those of validation."""
_WORD = "scsdpo"
_TURN = {"role": "assistant", "content": _WORD}
_warn = rank_zero_only(logging.getLogger(__name__).warning)


def check_start(module: Any, sources: Sequence[Source]) -> None:
    """Check that chat template, end-of-sequence ids, padding and the teacher's prompt agree.

    It logs one line a source.

    Args:
        module: has `policy.chat` and `teacher`.
        sources: of training questions; the first prompt of each is tried.

    Raises:
        ConfigurationError: if a source has no prompt, a gold answer cannot be read, or they do not
            agree; with the source's key and the remedy.
    """
    chat: Chat = module.policy.chat
    for number, source in enumerate(sources):
        with blamed_on(source_key("train", number, len(sources))):
            _check_source(module, source)
    _log_unread(chat)
    first = next(sources[0].read())
    with blamed_on("model.policy"):
        _check_rows(chat, chat.render(first.messages, first.tools))
    if chat.writes_date(first.messages, first.tools):
        _warn(
            f"model.policy.chat_template_kwargs: the chat template of "
            f"{chat.tokenizer.name_or_path!r} writes today's date, so a run that is resumed on "
            f"another day has other prompts; {{strftime_now: {date.today()}}} fixes the date"
        )


def check_context(module: Any, source: Source, longest: int) -> None:
    """Log one line if prompts and responses may be longer than the model's context.

    Args:
        module: has `policy.chat`, `teacher`, `reference`, `sampling` and `val_sampling`.
        source: of training questions; teacher and reference read its first prompt in each of their
            contexts, with a response of the greatest length.
        longest: tokens of the longest prompt.
    """
    chat: Chat = module.policy.chat
    prompt = rendered(next(source.read()), chat)
    needed = []
    for name in ("sampling", "val_sampling"):
        response = getattr(module, name).max_new_tokens
        needed.append(
            ("the policy's prompts have up to", longest, "data.max_prompt_tokens", response, name)
        )
    response = module.sampling.max_new_tokens
    for slot in ("teacher", "reference"):
        if getattr(module, slot).exists:
            contexts = _contexts(getattr(module, slot), chat, prompt, " a" * response)
            most = max((len(ids) for ids in contexts if ids), default=len(prompt.ids))
            said, key = longest + most - len(prompt.ids), f"max_tokens of model.{slot}.context"
            needed.append((f"the {slot}'s prompts have about", said, key, response, "sampling"))
    who, tokens, key, response, sampling = max(needed, key=lambda need: need[1] + need[3])
    if tokens + response > chat.positions:
        _warn(
            f"model.policy: {chat.tokenizer.name_or_path!r} has a context of {chat.positions} "
            f"tokens, but {who} {tokens} tokens, and a response up to {response} more: lower {key} "
            f"or model.{sampling}.max_new_tokens, or use a model with a longer context"
        )


def _check_rows(chat: Chat, prompt: tuple[int, ...]) -> None:
    """Refuse a tokenizer whose ids have no row in the embedding; texts never hold control ids."""
    own, model = chat.tokenizer, chat.tokenizer.name_or_path
    remedy = (
        "take the tokenizer that belongs to the model, or enlarge its embedding "
        "(`resize_token_embeddings`) and save it"
    )
    if used := sorted(i for i in set(prompt) if i >= chat.rows):
        raise ValueError(
            f"the chat template of {model!r} writes the token {_shown(chat, used[0])}, for which "
            f"the embedding ({chat.rows} rows) has no row; {remedy}"
        )
    if all(end >= chat.rows for end in chat.eos_ids):
        raise ValueError(
            f"no response of {model!r} can end, because the embedding ({chat.rows} rows) has no "
            f"row for {', '.join(_shown(chat, end) for end in chat.eos_ids)}; set `eos_token_id` "
            "in generation_config.json to a token that has one"
        )
    without = {i: token for token, i in own.get_vocab().items() if i >= chat.rows}
    if words := sorted(i for i in without if i not in chat.control_ids):
        raise ValueError(
            f"the tokenizer of {model!r} has {len(words)} tokens, such as "
            f"{_shown(chat, words[0])}, for which the embedding ({chat.rows} rows) has no row; "
            f"{remedy}"
        )
    if without:
        rank_zero_info(
            f"model.policy: the embedding of {model!r} ({chat.rows} rows) has no row for "
            f"{', '.join(_shown(chat, i) for i in sorted(without)[:3])}"
            f"{f' and {len(without) - 3} more' if len(without) > 3 else ''}. Texts that contain "
            f"them are split into ordinary tokens. If you need these tokens, {remedy}"
        )
    if lost := [end for end in chat.eos_ids if end >= min(chat.rows, len(own))]:
        rank_zero_info(
            f"model.policy: {model!r} cannot generate "
            f"{', '.join(_shown(chat, end) for end in lost)}, which `eos_token_id` names: "
            "responses end with the other tokens of `eos_token_id`"
        )


def _check_source(module: Any, source: Source) -> None:
    chat: Chat = module.policy.chat
    prompt = next(source.read(), None)
    if prompt is None:
        raise ValueError(f"{source.name!r} has no prompts; check where they come from")
    check_golds(source)
    header = _header(chat, prompt, source.name)
    if prompt.has_turns:
        _check_turns(module, prompt)
    found = [f"responses begin after {header!r} of the chat template and {_end(chat, prompt)}"]
    found += [f"padding is {_shown(chat, chat.pad_id)}"]
    if module.teacher.exists:
        found.append(_teacher(module, rendered(prompt, chat), source.name))
    rank_zero_info(f"{source.name}: {'; '.join(found)}")


def _check_turns(module: Any, prompt: Prompt) -> None:
    """Check that the sampler plays episodes and the chat template renders their answers."""
    if not module.rollout.plays_episodes:
        world, sampler = type(prompt.verifier).__name__, type(module.rollout).__name__
        raise ValueError(
            f"{world} is an environment of several turns, but {sampler} samples one turn: set "
            "model.rollout to HFRollout or VLLMRollout, or give your rollout a method `play`"
        )
    names = [str(tool["function"]["name"]) for tool in prompt.tools[:1]] or [_WORD]
    for role in prompt.verifier.roles(prompt):
        name = {"name": names[0]} if role == "tool" else {}
        try:
            module.policy.chat.continuation([{"role": role, "content": _WORD} | name], prompt.tools)
        except ValueError as error:
            remedy = "; set `role: user` of the environment" if role == "tool" else ""
            raise ValueError(
                f"{error}{remedy}, or use a model whose chat template has such turns"
            ) from error


def check_golds(source: Source) -> None:
    """Raise a ValueError if no response could match one of the first gold answers of a source.

    Rows of a file or set, and prompts of a stream, are checked while they are read instead.
    """
    if not source.proves_golds and not source.sequential:
        prompts = list(islice(source.read(), CHECK_AHEAD))
        refuse_unmet(source.name, prompts, lambda index: f"prompt {index + 1} of {source.name!r}")


def first_keys(train: Sequence[Source], *, streams: bool) -> list[str]:
    """Keys of the training questions: all of small sources, and the first ones of others.

    Args:
        train: the sources.
        streams: read the first questions of streams too.

    Raises:
        ConfigurationError: if a source cannot be read.
    """
    keys: list[str] = []
    for number, source in enumerate(train):
        with blamed_on(source_key("train", number, len(train))):
            if source.sequential and not streams:
                continue
            small = not source.sequential and len(source) <= CHECK_AHEAD
            first = islice(source.read(), CHECK_AHEAD if small else SHARED_AHEAD)
            keys += [prompt.key for prompt in first]
    return keys


def warn_twice(where: str, keys: Sequence[str], meaning: str) -> None:
    """Log how many questions are copies of others, and what that means for each copy."""
    (key, times), *_ = Counter(keys).most_common(1) or [("", 0)]
    if times > 1:
        _warn(
            "%s: %d of %d questions are duplicates; %s, for example, is there %d times. Each copy "
            "%s: leave duplicates out if they are not meant",
            *(where, len(keys) - len(set(keys)), len(keys), key, times, meaning),
        )


def warn_shared(train: Collection[str], val: Sequence[str]) -> int:
    """Count, and log, how many validation questions are among the first ones of training.

    Questions are compared by key; sources of different names have no key in common.

    Args:
        train: keys of training questions.
        val: keys of the validation questions.
    """
    known = set(train)
    both = [key for key in val if key in known]
    if both:
        _warn(
            "data.val: %d of %d questions, such as %s, are in data.train too: their figures are "
            "not those of held-out questions",
            *(len(both), len(val), both[0]),
        )
    return len(both)


def _log_unread(chat: Chat) -> None:
    template = chat.tokenizer.chat_template
    for name in chat.template_kwargs:
        if isinstance(template, str) and name not in template:
            _warn(
                "model.policy.chat_template_kwargs: the chat template of %r does not read %r, "
                "which therefore changes nothing",
                *(chat.tokenizer.name_or_path, name),
            )


def _header(chat: Chat, prompt: Prompt, name: str) -> str:
    """The text that opens the assistant's turn; the prompt's messages must come before it."""
    model = chat.tokenizer.name_or_path
    try:
        opened = chat.text(prompt.messages, prompt.tools)
        header = chat.header(prompt.messages, prompt.tools)
        answered = chat.text([*prompt.messages, _TURN], prompt.tools, opened=False)
    except TemplateError as error:
        roles = [message["role"] for message in prompt.messages]
        raise ValueError(
            f"the chat template of {model!r} refuses the first prompt of {name!r}, with the turns "
            f"{', '.join(roles)}: {error}"
        ) from error
    for message in prompt.messages:
        if message["content"].strip() not in opened:
            raise ValueError(
                f"the chat template of {model!r} leaves out the text of the role {message['role']} "
                f"in the first prompt of {name!r}; use a template that writes it"
            )
    # A template without a header may open the assistant's turn with the end of the user's, as
    # Mistral's [/INST] does; then it writes nothing else before the assistant's text.
    added = opened != chat.text(prompt.messages, prompt.tools, opened=False)
    before = answered.rpartition(_WORD)[0]
    if not header or not (added or before.rstrip() == opened.rstrip()):
        raise ValueError(
            f"the chat template of {model!r} does not open the assistant's turn when asked to "
            "(add_generation_prompt): responses would continue the user's message"
        )
    return header


def _end(chat: Chat, prompt: Prompt) -> str:
    """Describe the end of the assistant's turn; if it is a token, it must end responses too."""
    said = chat.text([*prompt.messages, _TURN], prompt.tools, opened=False)
    after = said.rpartition(_WORD)[2]
    ends = ", ".join(_shown(chat, end) for end in chat.eos_ids)
    if not after.strip():
        return f"end with {ends}; the template itself ends no turn"
    end = next((i for i in _ids(chat, after) if i in chat.control_ids), None)
    if end in chat.eos_ids:
        return f"end with {ends}"
    if end is not None:
        raise ValueError(
            f"the chat template of {chat.tokenizer.name_or_path!r} ends the assistant's turn with "
            f"{_shown(chat, end)}, but responses end with {ends}: add it to `eos_token_id` in "
            "generation_config.json"
        )
    return f"end with {ends}, while the template ends a turn with {after!r}"


def _contexts(teacher: Teacher, chat: Chat, prompt: Prompt, right: str) -> list[tuple[int, ...]]:
    """A teacher's prompt in each context, for a failure beside the success `right`; empty: none."""
    shape = (1, 2, 1)
    zeros = torch.zeros(shape)
    rewards = torch.tensor([[1.0, 0.0]])
    verdicts = (Verdict(reward=1.0), Verdict(reward=0.0, feedback="It is wrong."))
    responses = Responses.of_one_turn(
        prompts=(prompt,),
        ids=torch.full(shape, chat.eos_ids[0]),
        sampled=torch.ones(shape, dtype=torch.bool),
        sampling_logprobs=zeros,
        policy_logprobs=zeros,
        ended=torch.ones(shape[:2], dtype=torch.bool),
        texts=((right, "It is not."),),
        temperature=1.0,
    )
    judged = Judged(
        responses=responses, verdicts=(verdicts,), rewards=rewards, successes=rewards > 0.5
    )
    return [context.ids[0][1] for context in teacher.contexts(chat, judged).values()]


def _teacher(module: Any, prompt: Prompt, name: str) -> str:
    """Check that the teacher's prompt ends as the student's does, and describe it."""
    chat: Chat = module.policy.chat
    ids = _contexts(module.teacher, chat, prompt, "It is right.")[0]
    if not ids:
        return "the teacher has no prompt for a wrong response in a group with a right one"
    header = _ids(chat, _header(chat, prompt, name))
    if list(ids[-len(header) :]) != list(prompt.ids[-len(header) :]):
        raise ValueError(
            "model.teacher: its prompts must end with the same start of the assistant's turn as "
            f"the policy's, but end with {chat.decode(ids)[-40:]!r}; render them with `chat.render`"
        )
    more = len(ids) - len(prompt.ids)
    return f"the teacher's prompt is {more} tokens longer than the policy's and has the same end"


def _ids(chat: Chat, text: str) -> list[int]:
    """Ids of a text that the template wrote, control tokens included."""
    return chat.tokenizer.encode(text, add_special_tokens=False)


def _shown(chat: Chat, token: int) -> str:
    if token >= len(chat.tokenizer):
        return f"id {token}"
    return f"{chat.tokenizer.convert_ids_to_tokens(token)!r} ({token})"
