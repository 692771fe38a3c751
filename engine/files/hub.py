"""Checkpoints that are fetched from the Hugging Face hub, and which state of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from nudging.errors import BadRequest, CheckpointError

HUB_ID = r"\w[\w.-]*(/[\w.-]+)?"
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def is_hub_id(checkpoint: object) -> bool:
    """Whether this names a repository of the hub: OWNER/NAME, or the NAME of one of its oldest (gpt2), where
    no such directory is.
    """
    if not isinstance(checkpoint, str) or re.fullmatch(HUB_ID, checkpoint) is None:
        return False
    return not Path(checkpoint).expanduser().exists()


def download(hub_id: str, revision: str | None = None) -> Path:
    """The directory of a repository at a branch, tag or commit.  Raises CheckpointError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        named = hub_id if revision is None else f"{hub_id} at {revision}"
        raise CheckpointError(
            f"{named!r} is no local directory and could not be fetched from the hub ({error}); "
            "check the name, the network and HF_TOKEN, or download it and give its directory"
        ) from error


def read_revisions(
    revision: str | Mapping[str, str] | None, checkpoints: Mapping[str, object]
) -> dict[str, str]:
    """The revision of each role's repository that is not to be taken as it is now.

    A str is the only repository's; a map names it by role.  Raises BadRequest.
    """
    if revision is None:
        return {}
    hub = [role for role, checkpoint in checkpoints.items() if is_hub_id(checkpoint)]
    if isinstance(revision, str) and len({checkpoints[role] for role in hub}) > 1:
        raise BadRequest(
            f"revision is {revision!r} and {_listed(hub)} come from the hub; name each one's, as in "
            f"revision={{{hub[0]!r}: {revision!r}}}"
        )
    revisions = dict.fromkeys(hub, revision) if isinstance(revision, str) else revision
    if not isinstance(revisions, Mapping):
        raise BadRequest(f"revision is {revision!r:.80}; give a branch, tag or commit, or a dict by role")
    for role, value in revisions.items():
        if role not in hub:
            raise BadRequest(f"revision names {role!r}; from the hub comes {_listed(hub)}")
        if not isinstance(value, str) or not value:
            raise BadRequest(f"revision of {role!r} is {value!r:.80}; give a branch, tag or commit")
    if not revisions:
        raise BadRequest(f"revision is {revision!r} and no checkpoint comes from the hub; leave it away")
    return dict(revisions)


def _listed(roles: Iterable[str]) -> str:
    return ", ".join(map(repr, roles)) or "nothing"
