"""YAML configurations as plain text: nothing in them is executed, converted or repeated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sstmerge.errors import InputError
from sstmerge.untrusted import LONGEST_JSON

_NULL = "tag:yaml.org,2002:null"


class _PlainLoader(yaml.BaseLoader):
    """Leaves every scalar as the text that stands in the file, as a flag's value would be; null means "not given".

    Aliases are refused: a few lines of them stand for gigabytes of text.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses an alias (*name); write the value out")
        return super().compose_node(parent, index)


_PlainLoader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_PlainLoader.add_constructor(_NULL, lambda loader, node: None)


def read_yaml(path: Path) -> Any:
    """Read a YAML file as texts, lists and mappings.

    Args:
        path: The file.

    Returns:
        The content; None where there is none.

    Raises:
        InputError: If it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"The configuration '{path}' is not a file.")
    if path.stat().st_size > LONGEST_JSON:
        raise InputError(f"The configuration '{path}' is larger than {LONGEST_JSON:,} bytes; is it a configuration?")
    try:
        return yaml.load(path.read_text(), Loader=_PlainLoader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"The configuration '{path}' cannot be read as YAML: {error}") from error
