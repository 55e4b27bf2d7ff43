"""Which encoder names can be built, and which of them was meant."""

from __future__ import annotations

import difflib
import re
from functools import cache

import timm

from segmentation.errors import PipelineError

MODULES = ("vision_transformer", "eva")  # timm's, whose models have plain patch tokens
DEFAULT = "vit_base_patch14_dinov2"

SIZES = ("tiny", "small", "medium", "base", "large", "huge", "giant", "gigantic", "enormous")
_LETTERS = {"t": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large", "h": "huge", "g": "giant"}
_PATCHES = {"8", "14", "16", "32"}


def check_name(name: str) -> None:
    """Refuse a name that is no plain ViT of timm's, with or without its tag.

    Raises:
        PipelineError: with what to write instead.
    """
    architecture, _, tag = name.partition(".")
    if architecture in buildable():
        tags = {found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")}
        if tag and tag not in tags:
            have = f"it has {', '.join(sorted(tags))}" if tags else "it has none"
            raise PipelineError(f"encoder.name: {architecture} has no weights {tag!r}; {have}")
        return
    plain = re.sub(r"^(hf[-_]hub:|local-dir:)?([\w.-]+/)*", "", name).lower()
    if plain.partition(".")[0] in buildable():
        raise PipelineError(f"encoder.name: write {plain} instead of {name!r}: timm's own name, nothing before it")
    if timm.is_model(architecture):
        raise PipelineError(f"encoder.name: {name!r} is no plain ViT with patch tokens; try {DEFAULT}")
    raise PipelineError(f"encoder.name: timm knows no {name!r}; the nearest is {nearest(plain)}")


@cache
def buildable() -> frozenset[str]:
    """The names of timm's that `Encoder` can build, without tags."""
    return frozenset(name for module in MODULES for name in timm.list_models(module=module))


def nearest(name: str) -> str:
    """The name with weights that is most like this one in size, family (dinov2, clip, …) and patch, in this order.

    What the name leaves open is that of the default.
    """
    with_weights = {found for module in MODULES for found in timm.list_models(module=module, pretrained=True)}
    known = sorted(found.partition(".")[0] for found in with_weights if not found.startswith("test_"))
    vocabulary = {word for found in known for word in found.split("_")}
    wanted = [word for word in _words(name) if word != "vit"]

    def score(candidate: str) -> tuple[float, int, int, float]:
        words = candidate.split("_")
        total = 0.0
        for word in wanted:
            if word in vocabulary:  # another one that differs by a digit is another one
                likeness = float(word in words)
            else:
                likeness = max(difflib.SequenceMatcher(None, word, other).ratio() for other in words)
            total += _weight(word) * (likeness if likeness > 0.7 else 0.0)
        default = sum(word in words for word in DEFAULT.split("_"))
        return total, default, -len(words), difflib.SequenceMatcher(None, candidate, name).ratio()

    return max(known, key=score)


def _weight(word: str) -> float:
    if re.fullmatch(r"patch\d+", word):
        return 1.0
    if word.isdecimal():  # a photo size
        return 0.3
    return 3.0 if difflib.get_close_matches(word, SIZES, n=1, cutoff=0.75) or re.match(r"so\d+m|\d+b$", word) else 2.0


def _words(name: str) -> list[str]:
    """Its parts as timm writes them: `dinov2_vits14` has small, patch14 and dinov2."""
    words = []
    for part in re.split(r"[^a-z0-9]+", name.lower()):
        if found := re.fullmatch(r"(?:vit)?([tsmblhg])(\d+)?", part):
            words.append(_LETTERS[found[1]])
            part = found[2] or ""
        if part in _PATCHES:
            part = f"patch{part}"
        words.append(part)
    return [word for word in words if word]
