"""The catalogue: every model that an operator offers, by its id and by its aliases.

Read once from ``models.toml`` and never changed; a reload makes another one. A missing file is an error; a file without
models offers the models that the nodes list. Nodes are unknown here.
"""

import pathlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cortex.config import ModelProfile, ModelsFile
from cortex.settings import ConfigError, convert, read_toml


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Profiles by id, and the id of every alias. ``created`` is the file's modification time in Unix seconds.

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


def load(path: pathlib.Path, nodes: Collection[str]) -> Catalogue:
    """Return the catalogue in ``path``, whose profiles may name the given nodes.

    Raises:
        ConfigError: the file cannot be read, a key is wrong, an id or alias is taken, an alias leads in a circle or
            nowhere, or a profile names an unknown node.
    """
    source = str(path)
    file = convert(read_toml(path), ModelsFile, source)
    profiles: dict[str, ModelProfile] = {}
    for index, profile in enumerate(file.models):
        if profile.id in profiles:
            raise ConfigError(source, f"models[{index}].id", f"{profile.id!r} is used twice")
        if not profile.source:
            raise ConfigError(source, f"models[{index}].source", "is empty")
        for key in ("pinned", "preferred_nodes"):
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
        created=int(path.stat().st_mtime),
        prefixes={alias[:-1]: model for alias, model in aliases.items() if alias.endswith("*")},
    )


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
