"""A role's tokenizer as callers use it: text to ids and back, and the prompt of a conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nudging.checks import is_int, plain
from nudging.errors import BadRequest
from nudging.text.prompts import Messages, read_ids
from nudging.text.roles import Role


class RoleTokenizer:
    """What `LLM.get_tokenizer(role)` gives: the tokenizer and the chat template of one role.

    Ids are those that prompts and results have.  Safe to use from any thread, also after the LLM is closed.
    """

    def __init__(self, role: Role) -> None:
        """Raises BadRequest where the role's checkpoint has no tokenizer."""
        if role.tokenizer is None:
            raise BadRequest(
                f"the checkpoint of {role.name!r} has no tokenizer; prompts for it are token ids"
            )
        self.role = role.name
        self._role = role
        self._tokenizer = role.tokenizer

    def __repr__(self) -> str:
        return f"RoleTokenizer(role={self.role!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """The number of ids that the role's model has; ids go from 0 to one less."""
        return self._role.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids with which the role ends a text."""
        return self._role.eos_ids

    @property
    def max_len(self) -> int:
        """The role's context: the most tokens of prompt and text together."""
        return self._role.max_len

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; `add_special_tokens`: those of the tokenizer's own (BOS), as for a prompt.

        Raises BadRequest for what is no str.
        """
        if not isinstance(text, str):
            raise BadRequest(f"text is {text!r:.80}; encode takes a str")
        return self._tokenizer.encode(text, special=bool(add_special_tokens))

    def decode(self, token_ids: int | Iterable[int]) -> str:
        """The text that `encode` reads as these ids; special tokens have none.

        Raises BadRequest for ids that the tokenizer does not have.
        """
        ids = plain(token_ids)
        listed = [ids] if is_int(ids) else ids
        return self._tokenizer.decode(read_ids("token_ids", listed, self._tokenizer.vocab_size))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to a running text: none for a special token.  Raises BadRequest."""
        [token] = read_ids("token_id", [token_id], self.vocab_size)
        return self._tokenizer.token_bytes(token)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """The prompt of a conversation as the role's template writes it: its ids, or with `tokenize=False`
        its text.  `variables` are the template's own.  Raises BadRequest as `LLM.chat` does.
        """
        template = self._role.template
        text = template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self._tokenizer.encode(text, special=template.needs_special_tokens) if tokenize else text


def find_role(roles: Mapping[str, Role], name: object) -> Role:
    """An open role by its name.  Raises BadRequest."""
    if not isinstance(name, str) or name not in roles:
        raise BadRequest(f"there is no role {name!r}; open are {', '.join(roles)}")
    return roles[name]
