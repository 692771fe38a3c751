"""Whether the opened roles can serve a policy and its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nudging.core.sampling_params import SamplingParams
from nudging.errors import BadRequest
from nudging.policies.protocol import Policy
from nudging.text.roles import Role

# What every policy has; see `nudging.policies.protocol.Policy`.
POLICY_PARTS = ("roles", "lookahead", "shares_ids", "needs_tokenizer", "needs_logits", "start", "step")


def check_policy(policy: Any, roles: Mapping[str, Role]) -> None:
    """Raise BadRequest for what is no policy, and where the opened roles cannot serve it."""
    if isinstance(policy, type):
        raise BadRequest(
            f"policy is the class {policy.__name__}; give one of its objects, {policy.__name__}()"
        )
    if isinstance(policy, str):
        raise BadRequest(
            f"policy is {policy!r}; give a policy itself, such as Base() or Nudging(threshold=0.4)"
        )
    lacking = [name for name in POLICY_PARTS if not hasattr(policy, name)]
    if lacking:
        raise BadRequest(
            f"policy is {policy!r:.80}, which has no {', '.join(lacking)}; give Base(), Nudging() or "
            "a policy of your own (see nudging.Policy)"
        )
    for name in policy.roles:
        if name not in roles:
            remedy = f"{name}=..." if name in ("base", "guide") else f"models={{{name!r}: ...}}"
            raise BadRequest(
                f"{policy!r} needs the role {name!r} and only {', '.join(roles)} are open; "
                f"open the LLM with {remedy} or choose another policy"
            )
    used = [roles[name] for name in policy.roles]
    if policy.needs_tokenizer:
        for role in used:
            if role.tokenizer is None:
                raise BadRequest(
                    f"{policy!r} works on text and the checkpoint of {role.name!r} has no tokenizer; "
                    "add tokenizer.json or tokenizer.model, or use granularity='token'"
                )
    if policy.shares_ids:
        for role in used[1:]:
            _check_one_vocabulary(policy, used[0], role)


def check_ids(params: SamplingParams, roles: Sequence[Role]) -> None:
    """Raise BadRequest for ids that a model does not have, or for words where there is no text."""
    size = min(role.vocab_size for role in roles)
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token in getattr(params, name) or ():
            if token >= size:
                raise BadRequest(f"{name} names token {token}; ids go from 0 to {size - 1}")
    if any(role.tokenizer is None for role in roles):
        if params.stop:
            raise BadRequest("stop strings need a tokenizer and this checkpoint has none; use stop_token_ids")
        if params.bad_words:
            raise BadRequest("bad_words need a tokenizer and this checkpoint has none; use logit_bias")


def _check_one_vocabulary(policy: Policy, first: Role, other: Role) -> None:
    if first.tokenizer is not None and other.tokenizer is not None:
        why = first.tokenizer.difference(other.tokenizer)
    else:
        sizes = first.vocab_size, other.vocab_size
        why = None if sizes[0] == sizes[1] else f"they have {sizes[0]} and {sizes[1]} ids"
    if why is not None:
        raise BadRequest(
            f"{policy!r} passes token ids between {first.name!r} and {other.name!r}, whose vocabularies "
            f"differ: {why}; use granularity='reference', which passes text, or a pair with one tokenizer"
        )
