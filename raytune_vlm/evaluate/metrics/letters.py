"""Finding the chosen letter in what a model wrote: three published ways, one that never guesses.

Letters are `A`, `B`, ... of the choices. `None` means that no letter was found.
"""

import re
import string
from collections.abc import Sequence

_STATED = re.compile(
    r"(?:answer|option|choice)\b(?:\s+(?:is|would be|letter))*\s*[:=]?\s*[\"'*(\[{]*"
    r"(?:\\boxed\{)?(?-i:([A-Z]))(?![\w'\u2019])|\\boxed\{\s*(?:\\text\{)?\s*([A-Z])\s*\}",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"[\s\"'*(\[{<]*([A-Za-z])[\s\"'*)\]}>.:,;]*")
_LEADING = re.compile(r"\s*\(?([A-Z])(?:\)|\.|:|,)(?=\s|$)")
_BRACKETED = re.compile(r"\(([A-Z])\)")
_MARKED = re.compile(r"(?:^|\s)\(?([A-Z])[).:](?=\s|$)")
_ARTICLE = re.compile(r"\s+(?!because\b|since\b)\w", re.IGNORECASE)
MAX_LENGTH = 20_000
"""Only the end of a longer text is read."""


def plain_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter, if the text names exactly one; never a guess. A rule of ours.

    In this order, the first that finds something decides: the text is one letter (`b`, `(B)`,
    `B.`, `**B**`); one letter is stated (`answer: B`, `the correct option is (B)`, `\\boxed{B}`);
    it opens the text (`B. a dog`) and no other letter is so marked; one is in brackets; the text
    is a choice, but for case, white space and a full stop. Two different stated letters, a list of
    the choices, `the answer is A man`, prose: no letter.

    Without `choices`, any letter from A to Z may be meant.
    """
    text = text[-MAX_LENGTH:]
    letters = letters_of(choices) or string.ascii_uppercase
    if whole := _WHOLE.fullmatch(text):
        letter = whole[1].upper()
        return letter if letter in letters else None
    stated = {found[1] or found[2] for found in _STATED.finditer(text) if not _is_word(text, found)}
    for found in (stated, _opening(text), set(_BRACKETED.findall(text))):
        if found:
            return found.pop() if len(found) == 1 and found <= set(letters) else None
    said = _simple(text)
    named = zip(letters, choices, strict=False)
    same = [letter for letter, choice in named if _simple(choice) == said]
    return same[0] if len(same) == 1 and said else None


def mmmu_letter(text: str, choices: Sequence[str]) -> str | None:
    """MMMU's way: the last of `(B)`, else of ` B `, else of the choices' texts.

    MMMU-Benchmark/MMMU, `mmmu/utils/eval_utils.py`, `parse_multi_choice_response`. Where that picks
    a letter at random, this gives None.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    letters = letters_of(choices)
    for pattern in ("({})", " {} "):
        places = {letter: text.rfind(pattern.format(letter)) for letter in letters}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=places.__getitem__)
    if len(text.split()) > 5:
        said = text.lower()
        named = zip(letters, choices, strict=False)
        contents = {letter: said.rfind(choice.lower()) for letter, choice in named}
        if max(contents.values(), default=-1) >= 0:
            return max(contents, key=contents.__getitem__)
    return None


_VERBOSE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def vlmevalkit_letter(text: str, choices: Sequence[str]) -> str | None:
    """VLMEvalKit's way without a judge: one letter among the last words, else one choice's text.

    open-compass/VLMEvalKit, `vlmeval/utils/matching_util.py`, `can_infer`. A refusal (its `Z`) is
    None.
    """
    letters = letters_of(choices) or string.ascii_uppercase
    if "Failed to obtain answer via API" not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return None
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
        said_letters = [letter for letter in letters if letter in words]
        if len(said_letters) == 1 and words.index(said_letters[0]) > len(words) - 5:
            return said_letters[0]
        if not said_letters and "Z" in words:
            return None
        found = _VERBOSE.search(text)
        if found and found[1].upper() in letters:
            return found[1].upper()
    said = text.lower()
    if len(said) > 2 * sum(map(len, choices)):
        return None
    named = zip(letters, choices, strict=False)
    held = [letter for letter, choice in named if choice.lower() in said]
    return held[0] if len(held) == 1 else None


_PHRASES = (
    *(f"{the}{which}answer is" for the in ("the ", "") for which in ("", "correct ", "best ")),
    *(f"{the}{which}option is" for the in ("the ", "") for which in ("correct ", "best ")),
    *(f"{the}{which}choice is" for the in ("the ", "") for which in ("", "correct ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_letter(text: str, choices: Sequence[str]) -> str | None:
    """lmms-eval's way: many formats, the surest kind first, and of one kind the last in the text.

    EvolvingLMMs-Lab/lmms-eval, `lmms_eval/tasks/_task_utils/mcq_extract.py`. It nearly always finds
    something: in the end any capital from the choices, also inside a word, so that prose scores by
    luck. Without choices the letters are A to H.
    """
    letters = letters_of(choices) or "ABCDEFGH"
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    padded, bare = f" {text} ", text.strip()
    marks = {6: "({})", 5: "{}.", 4: "{}:", 3: "{})", 2: "{} ", 0: "{}"}
    ranks: dict[int, dict[str, int]] = {
        rank: {x: padded.rfind(mark.format(x)) for x in letters} for rank, mark in marks.items()
    } | {
        10: {x: 0 for x in letters if bare.startswith(x) and not bare[1:2].isalpha()},
        9: {x: 0 for x in letters if bare.endswith(x) and not bare[-2:-1].isalpha()},
        7: _after_phrases(padded, letters),
    }
    for rank in sorted(ranks, reverse=True):
        places = {letter: place for letter, place in ranks[rank].items() if place >= 0}
        if places:
            return max(places, key=places.__getitem__)
    return None


def _after_phrases(text: str, letters: str) -> dict[str, int]:
    """The furthest first place of each letter after one of the phrases."""
    said = text.lower()
    starts = [said.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in said]
    return {x: max((text.find(x, start) for start in starts), default=-1) for x in letters}


def letters_of(choices: Sequence[str]) -> str:
    """`ABC` for three choices, at most the 26 letters."""
    return string.ascii_uppercase[: len(choices)]


def _opening(text: str) -> set[str]:
    found = _LEADING.match(text)
    return {found[1], *_MARKED.findall(text)} if found else set()


def _is_word(text: str, found: re.Match[str]) -> bool:
    """Whether a stated `A` or `I` is an English word: another word follows."""
    return found[1] in ("A", "I") and _ARTICLE.match(text, found.end()) is not None


def _simple(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")
