"""Full blocks by what they hold: a request that begins like an earlier one finds its blocks again."""

from __future__ import annotations

import os
from array import array
from collections.abc import KeysView, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from weakref import WeakValueDictionary


@dataclass(eq=False, slots=True, weakref_slot=True)
class Prefix:
    """A beginning of a text that fills whole blocks: `tokens` in `block`, after those of `parent`.

    The empty one, with which every text of one salt begins, has no parent, no tokens and no block (-1).
    """

    key: bytes
    parent: Prefix | None
    tokens: tuple[int, ...]
    block: int


class PrefixCache:
    """Which blocks of one pool hold which beginnings of texts.

    A key is a hash over the parent's key and the block's tokens, keyed with a secret of this cache, so that
    nobody can choose tokens that collide; and a hit counts only if parent and tokens are the same themselves.
    """

    def __init__(self) -> None:
        self._secret = os.urandom(32)
        self._empty: WeakValueDictionary[str | None, Prefix] = WeakValueDictionary()
        self._by_key: dict[bytes, Prefix] = {}
        self._by_block: dict[int, Prefix] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    @property
    def blocks(self) -> KeysView[int]:
        """The blocks that can be found."""
        return self._by_block.keys()

    def empty(self, salt: str | None) -> Prefix:
        """The beginning of every text of one salt; texts of unlike salts have nothing in common."""
        found = self._empty.get(salt)
        if found is None:
            key = self._hash(b"" if salt is None else b"salt" + salt.encode("utf-8", "surrogatepass"))
            found = self._empty[salt] = Prefix(key, None, (), -1)
        return found

    def find(self, parent: Prefix, tokens: Sequence[int]) -> Prefix | None:
        """The known prefix of `tokens` behind `parent`."""
        tokens = tuple(tokens)
        found = self._by_key.get(self._key(parent, tokens))
        if found is None or found.parent is not parent or found.tokens != tokens:
            return None
        return found

    def add(self, parent: Prefix, tokens: Sequence[int], block: int) -> tuple[Prefix, int | None]:
        """Make `block` findable, and the block that cannot be found any more since they share a key.

        Where the same prefix is known already, that one is returned, with its own block.
        """
        known = self.find(parent, tokens)
        if known is not None:
            return known, None
        assert block not in self._by_block, f"block {block} holds another prefix"
        tokens = tuple(tokens)
        key = self._key(parent, tokens)
        stale = self._by_key.get(key)
        if stale is not None:
            del self._by_block[stale.block]
        prefix = self._by_key[key] = self._by_block[block] = Prefix(key, parent, tokens, block)
        return prefix, None if stale is None else stale.block

    def forget(self, block: int) -> None:
        """A block is about to hold something else."""
        del self._by_key[self._by_block.pop(block).key]

    def _key(self, parent: Prefix, tokens: tuple[int, ...]) -> bytes:
        return self._hash(parent.key + array("q", tokens).tobytes())

    def _hash(self, data: bytes) -> bytes:
        return blake2b(data, key=self._secret, digest_size=16).digest()
