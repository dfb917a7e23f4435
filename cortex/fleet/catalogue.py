"""The catalogue: every model that an operator offers, by its id and by its aliases.

Read once from ``models.toml`` and the file of added models, and never changed; a reload makes another one. A missing
``models.toml`` is an error; a catalogue without models offers the models that the nodes list. Nodes are unknown here.
"""

import logging
import pathlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from cortex.config import ModelProfile, ModelsFile
from cortex.fleet import added as added_models
from cortex.settings import ConfigError, convert, read_toml

log = logging.getLogger("cortex.config")

NODE_KEYS = ("pinned", "preferred_nodes")
"""Keys of a profile that name nodes."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Profiles by id, and the id of every alias. ``created`` is the time of the last change in Unix seconds.

    ``prefixes`` are the aliases that end with a ``*``, without it.
    """

    profiles: Mapping[str, ModelProfile]
    aliases: Mapping[str, str]
    created: int = 0
    prefixes: Mapping[str, str] = field(default_factory=dict)
    discovers: bool = True
    """Whether models are offered that nodes list and no file names."""
    withdrawn: frozenset[str] = frozenset()
    """Models that a reload has removed from the file: not offered, even where a node lists them."""
    added: frozenset[str] = frozenset()
    """Models that commands or the dashboard added (:mod:`cortex.fleet.added`)."""

    def resolve(self, name: str) -> str:
        """Return the id of an alias; any other name is returned as it is."""
        return self.aliases.get(name, name)

    def admits(self, model: str) -> bool:
        """Return whether a model may be offered where a node has it or can load it."""
        return model in self.profiles or (self.discovers and model not in self.withdrawn)

    def match(self, name: str) -> str | None:
        """Return the id of the longest prefix alias that matches a name, or ``None``."""
        prefix = max((prefix for prefix in self.prefixes if name.startswith(prefix)), key=len, default=None)
        return None if prefix is None else self.prefixes[prefix]


def load(path: pathlib.Path | None, nodes: Collection[str], added: pathlib.Path | None = None) -> Catalogue:
    """Return the catalogue in ``path``, whose profiles may name the given nodes, with the models of ``added``.

    Raises:
        ConfigError: a file cannot be read, a key is wrong, an id or alias is taken, an alias leads in a circle or
            nowhere, or a profile names an unknown node.
    """
    files = [file for file in (path, added) if file is not None and file.exists()]
    operators = _of_operator(path, nodes) if path is not None else Catalogue({}, {})
    merged = operators if added is None else _with_added(operators, added_models.read(added), nodes, str(added))
    return replace(merged, created=max((int(file.stat().st_mtime) for file in files), default=0))


def _of_operator(path: pathlib.Path, nodes: Collection[str]) -> Catalogue:
    """Return the catalogue in ``models.toml``."""
    source = str(path)
    file = convert(read_toml(path), ModelsFile, source)
    profiles: dict[str, ModelProfile] = {}
    for index, profile in enumerate(file.models):
        if profile.id in profiles:
            raise ConfigError(source, f"models[{index}].id", f"{profile.id!r} is used twice")
        if not profile.source:
            raise ConfigError(source, f"models[{index}].source", "is empty")
        for key in NODE_KEYS:
            for node in getattr(profile, key):
                if node not in nodes:
                    raise ConfigError(source, f"models[{index}].{key}", f"{node!r} is not one of [[neurons]]")
        profiles[profile.id] = profile
    targets: dict[str, tuple[str, str]] = {}  # alias -> its target, and the key in the file
    for index, profile in enumerate(file.models):
        for alias in profile.aliases:
            _claim(targets, profiles, alias, profile.id, f"models[{index}].aliases", source)
    for alias, target in file.aliases.items():
        _claim(targets, profiles, alias, target, f"aliases.{alias}", source)
    aliases = {alias: _follow(alias, targets, profiles, source) for alias in targets}
    return Catalogue(
        profiles,
        {alias: model for alias, model in aliases.items() if not alias.endswith("*")},
        prefixes={alias[:-1]: model for alias, model in aliases.items() if alias.endswith("*")},
    )


def _with_added(operators: Catalogue, file: ModelsFile, nodes: Collection[str], source: str) -> Catalogue:
    """Return a catalogue with the added models.

    The operator's files win: an added model whose id they use is left out, and so are an alias that they use and a
    node that they no longer name, so that no change of theirs is refused for what a command once added.
    """
    profiles, aliases, added = dict(operators.profiles), dict(operators.aliases), set()
    for index, profile in enumerate(file.models):
        if not profile.source:
            raise ConfigError(source, f"models[{index}].source", "is empty")
        if profile.id in added:
            raise ConfigError(source, f"models[{index}].id", f"{profile.id!r} is used twice")
        if profile.id in profiles or profile.id in aliases:
            log.info("%s: models[%d]: models.toml has %r, so this one is left out", source, index, profile.id)
            continue
        there = {key: tuple(node for node in getattr(profile, key) if node in nodes) for key in NODE_KEYS}
        profiles[profile.id] = msgspec.structs.replace(profile, **there)
        added.add(profile.id)
    for profile in file.models:
        if profile.id in added:
            aliases |= {
                alias: profile.id for alias in profile.aliases if alias not in aliases and alias not in profiles
            }
    return replace(operators, profiles=profiles, aliases=aliases, added=frozenset(added))


def _claim(
    targets: dict[str, tuple[str, str]],
    profiles: Mapping[str, ModelProfile],
    alias: str,
    target: str,
    key: str,
    source: str,
) -> None:
    if alias in profiles:
        raise ConfigError(source, key, f"{alias!r} is the id of a model")
    if alias in targets:
        raise ConfigError(source, key, f"{alias!r} is already an alias of {targets[alias][0]!r}")
    targets[alias] = (target, key)


def _follow(
    alias: str, targets: Mapping[str, tuple[str, str]], profiles: Mapping[str, ModelProfile], source: str
) -> str:
    """Return the model id at the end of a chain of aliases."""
    key = targets[alias][1]
    seen = [alias]
    name = targets[alias][0]
    while name not in profiles:
        if name in seen:
            raise ConfigError(source, key, f"aliases form a loop: {' -> '.join([*seen, name])}")
        if name not in targets:
            raise ConfigError(source, key, f"{name!r} is neither a model nor an alias")
        seen.append(name)
        name = targets[name][0]
    return name
