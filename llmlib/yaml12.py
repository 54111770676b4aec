"""YAML as people mean it: 1e4 is a number, as YAML 1.2 says, and a key that stands twice is an error."""

import re

import yaml

from llmlib.errors import require


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps to YAML 1.1: there 1e4 is a word, and the last of two equal keys wins."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        line = node.start_mark.line + 1
        require(not twice, f"the mapping from line {line} on has {', '.join(twice)} twice: give it once")
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str):
    """What the YAML text says, in plain Python; ConfigError for a key that stands twice in one mapping."""
    return yaml.load(text, Loader)  # noqa: S506
