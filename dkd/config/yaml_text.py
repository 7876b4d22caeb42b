"""Read untrusted YAML: plain values of a bounded size, no key twice, and every error as one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from typing import Any, NamedTuple

import yaml

from dkd.errors import InputError

MOST_CHARACTERS = 2**20
"""Characters of a document, at most."""
MOST_VALUES = 20_000
"""Values of a document, at most; each alias counts as all values that it stands for. The recipes of this repository
have fewer than 200."""
DEEPEST = 50
"""Levels of nested lists and mappings, at most, aliases followed."""

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_MERGE = "tag:yaml.org,2002:merge"


class YamlTextError(InputError):
    """A text is not YAML, or holds more than a recipe can."""


def read(text: str) -> Any:
    """Return the value that `text` holds. Dates stay text: no key of a recipe is a date.

    Raises:
        YamlTextError: the text is not YAML, holds a key twice, or is too long, too deep or too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlTextError(f"holds more than {MOST_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except _TooLarge as error:
        raise YamlTextError(str(error)) from None
    except yaml.YAMLError as error:
        raise YamlTextError(f"is not YAML: {' '.join(str(error).split())}") from None


def read_argument(text: str) -> Any:
    """Return the value of one argument of a command line. In contrast to `read`, `#` begins no comment: on a command
    line it is part of a name.

    Raises:
        YamlTextError: as `read`; or YAML would read a part of the text as a comment, and the rest is more than plain
            text.
    """
    if "#" in text and len(text) <= MOST_CHARACTERS:
        try:
            tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
        except yaml.YAMLError:
            return read(text)  # raises with the error's name
        gaps = (text[before.end_mark.index : after.start_mark.index] for before, after in itertools.pairwise(tokens))
        if any("#" in gap for gap in gaps):
            within = tokens[1:-1]  # without the start and the end of the stream
            if any(not (isinstance(token, yaml.ScalarToken) and token.plain) for token in within) or len(within) > 1:
                raise YamlTextError(
                    "holds a # with which YAML begins a comment; write text that holds one in quotes of its own: "
                    "'key=\"a #1\"'"
                )
            return text.strip()
    return read(text)


class _TooLarge(Exception):
    """A text exceeds a bound. This is no YAMLError, which would name a line: the bound is one of the whole text."""


class _Extent(NamedTuple):
    """Count the size of a node, aliases followed."""

    values: int
    """Values in the node, the node itself included."""
    levels: int
    """Levels of nested lists and mappings."""
    characters: int
    """Characters of all values."""


class _Loader(yaml.SafeLoader):
    """Read what `yaml.safe_load` reads, within bounds."""

    # Dates stay text: a date that does not exist would be an error of Python, and no key holds a date.
    yaml_implicit_resolvers = {  # noqa: RUF012 (the name and the kind are PyYAML's)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._extents: dict[int, _Extent] = {}
        """Extent of each node, by the node's id: nodes live as long as their document."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level += 1
        if self._level > DEEPEST:
            raise _TooLarge(f"is nested more than {DEEPEST} levels deep")
        is_alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        if is_alias and id(node) not in self._extents:  # the alias stands for a value that is not complete yet
            raise _TooLarge("holds a value that contains itself")
        if node is not None and not is_alias:
            self._extents[id(node)] = self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> _Extent:
        if isinstance(node, yaml.ScalarNode):
            if any("\ud800" <= character <= "\udfff" for character in node.value):
                raise yaml.composer.ComposerError(
                    None, None, f"{node.value[:60]!r} holds half of a character", node.start_mark
                )
            return _Extent(1, 1, len(node.value))
        children = (
            [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        )
        within = [self._extents[id(child)] for child in children]
        extent = _Extent(
            1 + sum(child.values for child in within),
            1 + max((child.levels for child in within), default=0),
            sum(child.characters for child in within),
        )
        for count, most, what in (
            (extent.values, MOST_VALUES, "values"),
            (extent.characters, MOST_CHARACTERS, "characters"),
        ):
            if count > most:
                raise _TooLarge(f"holds more than {most:,} {what} (an alias counts as all that it stands for)")
        if extent.levels > DEEPEST:
            raise _TooLarge(f"is nested more than {DEEPEST} levels deep")
        return extent

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        # int(), float(), date() and PyYAML's own tables expect that a tag is true, and raise where it is not.
        except Exception as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{str(node.value)[:60]!r} cannot be read as {kind}: {str(error)[:100]}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is there twice, of which the later one would be used without a warning."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)
