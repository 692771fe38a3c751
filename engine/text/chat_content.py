"""Whether a chat template reads a message's content as one text or walks through its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jinja2 import nodes

_WALKING = frozenset({"map", "selectattr", "rejectattr", "select", "reject"})
_STRING_TESTS = frozenset({"string", "iterable", "sequence", "mapping"})
_PART_KEYS = frozenset({"text", "type"})


class ContentForm(NamedTuple):
    """walks_parts: it walks through a list of parts; takes_text: it also asks whether there is one text."""

    walks_parts: bool
    takes_text: bool


def content_form(tree: nodes.Template) -> ContentForm:
    """How the template reads `message.content`, directly, by another name or in a macro."""
    names = _names_of_content(tree)
    walks = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    walks = walks or any(
        f.name in _WALKING and f.node is not None and _is_content(f.node, names)
        for f in tree.find_all(nodes.Filter)
    )
    walks = walks or any(_is_part_by_number(node, names) for node in _lookups(tree))
    return ContentForm(walks, any(test.name in _STRING_TESTS for test in tree.find_all(nodes.Test)))


def _lookups(tree: nodes.Node) -> Iterator[nodes.Getattr | nodes.Getitem]:
    yield from tree.find_all(nodes.Getattr)
    yield from tree.find_all(nodes.Getitem)


def _key(node: nodes.Node) -> object:
    """What is looked up: `a.key` or `a["key"]`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


def _is_content(node: nodes.Node, names: frozenset[str]) -> bool:
    """Whether the expression is a message's content, filtered or not."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return _key(node) == "content" or (isinstance(node, nodes.Name) and node.name in names)


def _is_part_by_number(node: nodes.Getattr | nodes.Getitem, names: frozenset[str]) -> bool:
    """`content[0].text`."""
    inner = node.node
    if _key(node) not in _PART_KEYS or not isinstance(inner, nodes.Getitem):
        return False
    return isinstance(_key(inner), int) and _is_content(inner.node, names)


def _names_of_content(tree: nodes.Template) -> frozenset[str]:
    """The variables that a content is assigned to, and the parameters of macros that one is given to."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: frozenset[str] = frozenset()
    while True:
        found = set(names)
        for step in tree.find_all(nodes.Assign):
            if isinstance(step.target, nodes.Name) and _may_be_content(step.node, names):
                found.add(step.target.name)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                given = zip(macros[call.node.name].args, call.args, strict=False)
                found |= {parameter.name for parameter, value in given if _is_content(value, names)}
        if found == names:
            return names
        names = frozenset(found)


def _may_be_content(node: nodes.Node, names: frozenset[str]) -> bool:
    """A content, or one in either branch of a choice."""
    if isinstance(node, nodes.CondExpr):
        branches = [node.expr1] if node.expr2 is None else [node.expr1, node.expr2]
        return any(_may_be_content(branch, names) for branch in branches)
    return _is_content(node, names)
