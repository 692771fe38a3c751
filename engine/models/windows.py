"""Sliding windows: which layers have one, by the words that the families have for it."""

from __future__ import annotations

from collections.abc import Callable

from nudging.models.json_config import RawConfig
from nudging.models.rope import MAX_POSITION

SLIDING, FULL = "sliding_attention", "full_attention"


def window_of(raw: RawConfig) -> int:
    """The sliding window in tokens, 0 where `sliding_window` is null or 0."""
    return raw.integer("sliding_window", MAX_POSITION, default=0, least=0)


def sliding_layers(raw: RawConfig, num_layers: int, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers slide: by `layer_types`, else by `default(layer)`."""
    types = raw.get("layer_types")
    if types is None:
        return tuple(default(i) for i in range(num_layers))
    known = (SLIDING, FULL)
    if not isinstance(types, list) or len(types) != num_layers or not all(t in known for t in types):
        raw.wrong("layer_types", f"a list of {num_layers} times one of {', '.join(known)}")
    return tuple(t == SLIDING for t in types)


def layer_windows(raw: RawConfig, sliding: tuple[bool, ...], window: int) -> tuple[int, ...]:
    """The window of each layer, given which layers slide."""
    if any(sliding) and not window:
        raw.wrong("sliding_window", "an integer above 0 where layers have a sliding window")
    return tuple(window if slides else 0 for slides in sliding)


def check_words(raw: RawConfig, windows: tuple[int, ...], max_position: int) -> None:
    """Raise CheckpointError where a word that this family does not read contradicts its `windows`."""
    used = set(raw.seen)
    slides = any(windows)
    if "layer_types" not in used:
        actual = tuple(window > 0 for window in windows)
        if sliding_layers(raw, len(windows), lambda i: actual[i]) != actual:
            raw.wrong("layer_types", f"all {SLIDING if slides else FULL} or missing in this family")
    is_off = "use_sliding_window" not in used and not raw.flag("use_sliding_window", True)
    if is_off and slides:
        raw.wrong("use_sliding_window", "true or missing where layers have a sliding window")
    if "sliding_window" not in used and not is_off and 0 < window_of(raw) < max_position:
        raw.wrong("sliding_window", "null in this family, whose layers all see the whole text")
    raw.get("max_window_layers")  # says nothing where no layer slides by it
    size = raw.integer("sliding_window_size", MAX_POSITION, default=max(windows), least=0)
    if size != max(windows):
        raw.wrong("sliding_window_size", f"sliding_window = {max(windows)}, or missing")
