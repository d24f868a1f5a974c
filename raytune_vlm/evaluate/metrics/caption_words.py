"""Words of a caption, nearly as the COCO evaluation's tokeniser cuts them, without Java.

There, Stanford's PTBTokenizer (CoreNLP 3.4.1, `-lowerCase`) cuts a text after the Penn Treebank,
and salaniz/pycocoevalcap, `tokenizer/ptbtokenizer.py`, drops common punctuation. As there,
`isn't` is `is n't`, `man's` is `man 's`, `cannot` is `can not`; brackets are the words `-lrb-`,
`-rrb-`, `-lsb-`, ...; hyphens, slashes, periods and commas inside a word or number stay; `mr.` and
`u.s.` keep their periods; runs such as `?!` are words.

Different, and rare in captions (1 of 3,000 made ones): abbreviations are a short list; emoticons,
phone numbers, `rock'n'roll`, fraction signs and SGML other than `&amp;`, `&lt;`, `&gt;` are cut as
any text; only the first `MAX_LENGTH` characters are read. Scripts without blanks (Chinese,
Japanese, Thai) stay one word up to the next mark, as they do there.
"""

import re

_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
_PLAIN = str.maketrans(
    dict.fromkeys("\u2018\u2019\u00b4", "'")
    | dict.fromkeys("\u201c\u201d", '"')
    | dict.fromkeys("\u2013\u2014", "--")
    | {"\u2026": "...", "\xa0": " ", "\u20ac": "$", "\u00a3": "#"}
)
_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na",
    "gimme": "gim me", "lemme": "lem me", "'twas": "'t was", "'tis": "'t is",
}  # fmt: skip
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|st|jr|sr|inc|ltd|co|corp|vs|etc|dept|ave|blvd|rd|ft|mt|capt|col|gen|lt|sgt|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
_LETTERS = r"[^\W\d_]"
_TOKEN = re.compile(
    rf"""
      https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | [@]{_LETTERS}\w* | </?{_LETTERS}[^<>\s]*>
    | (?:{_LETTERS}\.){{2,}} | (?<![\w'/]){_LETTERS}\.(?=\s|$)
    | (?:{_ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)
    | [+-]?\.?\d+(?:[.,:/]\d+)*(?:(?![ap]m\b)\w+)?(?:[-/]\w+)*
    | '\d\ds?\b | '(?:twas|tis)\b
    | n't\b | '(?:s|m|d|re|ve|ll)\b
    | \w+?(?=n't\b|'(?:s|m|d|re|ve|ll)\b) | \w+(?:[-/&._]\w+)*?(?=n't\b|'(?:s|m|d|re|ve|ll)\b)
    | {_LETTERS}'\w+ | \w+(?:[-/&._]\w+)*
    | \.{{3}} | -{{2,}} | [?!]+ | ''
    | \S
    """,
    re.VERBOSE,
)
MAX_LENGTH = 20_000
"""Characters that are read of a text."""


def caption_words(text: str) -> list[str]:
    """The words of a text in lower case, without common punctuation."""
    plain = text[:MAX_LENGTH].translate(_PLAIN).lower()
    for name, mark in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        plain = plain.replace(name, mark)
    words = [part for word in _TOKEN.findall(plain) for part in _SPLIT.get(word, word).split()]
    kept = (_BRACKETS.get(word, word) for word in words if word not in _DROPPED)
    return [word for word in kept if word != '"']
