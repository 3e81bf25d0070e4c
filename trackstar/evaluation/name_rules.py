"""Whether a text names something: rules on strings, for entailment without a model and for categories.

Text and name are brought to the same form and compared word by word:

    letters    without case and accents; ß is ss
    numbers    without thousands separators (1,234 is 1234) and without zeros behind a fraction (3.50 is 3.5)
    dates      day, month, year, whether written 12 March 1999, March 12th, 1999, 12 Mar. 1999 or 1999-03-12
    the rest   punctuation and underscores part words; a name loses an article in front

A name occurs where its words stand together in the text, so "Oman" does not occur in "Roman". What the rules cannot
see: another name that is no alias, a pronoun, a negation, and whether two names in one text have to do with each other.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_MONTHS = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_ABBREVIATIONS = {name[:3]: name for name in _MONTHS} | {"sept": "september"}
_MONTH = "|".join([*_MONTHS, *sorted(_ABBREVIATIONS, key=len, reverse=True)])
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_ISO = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_DAY_MONTH = re.compile(rf"\b{_DAY}\s+(?:of\s+)?({_MONTH})\b\.?,?")
_MONTH_DAY = re.compile(rf"\b({_MONTH})\b\.?\s+{_DAY}\b,?")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_WORD = re.compile(r"\d+\.\d+|[^\W_]+")
_ARTICLES = ("a", "an", "the")
# Words of a relation shorter than this ("of", "by", "in") say nothing.
_SHORT = 4


class Names:
    """A text that is asked which names occur in it."""

    def __init__(self, text: str) -> None:
        self._text = f" {' '.join(words_of(text))} "

    def holds(self, name: str) -> bool:
        """Whether a name occurs; one without letters and digits does not."""
        words = words_of(name)
        if len(words) > 1 and words[0] in _ARTICLES:
            words = words[1:]
        return bool(words) and f" {' '.join(words)} " in self._text

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether one of the names occurs."""
        return any(self.holds(name) for name in names)

    def hints_at(self, relation: str) -> bool:
        """Whether a word of the relation, short ones aside, begins a word of the text; true if it has none."""
        parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", relation)
        words = [word for word in words_of(parted) if len(word) >= _SHORT]
        return not words or any(f" {word}" in self._text for word in words)


def words_of(text: str) -> list[str]:
    """The words of a text in the form in which they are compared."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(character for character in decomposed if not unicodedata.combining(character))
    plain = _ISO.sub(lambda found: _date(found[3], _month_of(found[2]), found[1]), plain)
    plain = _DAY_MONTH.sub(lambda found: _date(found[1], _ABBREVIATIONS[found[2][:3]]), plain)
    plain = _MONTH_DAY.sub(lambda found: _date(found[2], _ABBREVIATIONS[found[1][:3]]), plain)
    plain = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), plain)
    return [_number(word) for word in _WORD.findall(plain)]


def _date(day: str, month: str, year: str = "") -> str:
    return f" {int(day)} {month} {year} "


def _month_of(number: str) -> str:
    return _MONTHS[int(number) - 1] if 1 <= int(number) <= 12 else number


def _number(word: str) -> str:
    return word.rstrip("0").rstrip(".") if "." in word else word
