"""Awkward strings for tokenizers, made by the thousand from a fixed seed that is printed."""

import random
from collections.abc import Sequence

from hf_models import CORPUS

# what a string mixes: each is drawn from some of these
_GROUPS = (
    " ".join(CORPUS).split(" "),
    (" ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\u00a0", "\u2003", "\u200b", "\ufeff", "▁"),
    ("😀", "👩‍👩‍👧", "🇩🇪", "🏳️‍🌈", "👍🏽", "❤️"),
    ("日本語", "テキスト", "中文", "文本", "한국어", "。", "、", "ｆｕｌｌ", "が"),
    ("العربية", "עברית", "\u200f", "\u202e", "مرحبا", "٣"),
    ("\x00", "\x01", "\x1b[0m", "\x7f", "\x85", "\u2028"),
    ("0", "12", "345", "6789", "3.14", "-7", "1e-9", "0x1F", "²", "Ⅷ", "½"),
    ("def f(x):", "\n    return x", "{", "}", "();", "==", "->", "//", "#", "__init__", "a_b", "camelCase", "\\n", "<div>", "</p>"),
    ("'s", "'LL", "'d", "don't", "WE'VE", "'", "..", "!?", "—", "“"),
    ("é", "e\u0301", "ß", "ﬁ", "Ǆ", "ı", "İ", "ñ", "\u0301", "ά", "й", "и\u0306", "가", "\u1100\u1161"),
)


def awkward_strings(special: Sequence[str], n: int = 1200, seed: int = 5) -> list[str]:
    """Makes different strings of runs of spaces, emoji, scripts, control characters, numbers, code and special tokens.

    Args:
        special: Texts of the tokenizer's special and added tokens.
        n: How many.
        seed: Seed of the choices.
    """
    print(f"awkward strings, seed {seed}")
    rng = random.Random(seed)
    strings: dict[str, None] = {}
    while len(strings) < n:
        groups = rng.sample((*_GROUPS, special), rng.randint(1, 4))
        strings["".join(rng.choice(rng.choice(groups)) for _ in range(rng.randint(1, 12)))] = None
    return list(strings)
