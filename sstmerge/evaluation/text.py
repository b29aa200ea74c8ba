"""Comparing texts: one normal form for prompts and completions."""

from __future__ import annotations

import re
import unicodedata

QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "`": "'", "´": "'", "“": '"', "”": '"', "«": '"', "»": '"'})
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def normalise(text: str) -> str:
    """Return the text with straight quotes, lower case and single spaces, for comparison."""
    return " ".join(unicodedata.normalize("NFKC", text).translate(QUOTES).casefold().split())


def exact_match(completion: str, response: str) -> bool:
    """Return whether two texts are the same but for whitespace, case and the shape of quotes."""
    return normalise(completion) == normalise(response)
