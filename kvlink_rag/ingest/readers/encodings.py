"""Bytes to text: which encoding they are in, and what to say about it.

By a byte order mark, a declaration, UTF-8, or what `charset-normalizer` takes them for. One bad
byte in a file of UTF-8 changes that byte only. Knows no format.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from charset_normalizer import from_bytes

_BINARY_LOOK = 8192  # a NUL this early means that a file is not text, as for git
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LOOK = 2**16  # bytes that are enough to tell an encoding
_BEFORE = 2000  # … of which so many stand before the first that is not UTF-8
_FEW = 200  # where one byte in more than so many is not ASCII, the others cannot tell
_TOO_FEW = 6  # … nor so few where most of a text is ASCII
_MORE = 3  # times as many good characters as bad bytes: UTF-8 that was damaged
_SURROGATES = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")  # in what some programs call UTF-8
_SIGNS = re.compile(
    rb"[\x80\x85\x8a\x8c\x8e\x91-\x97\x99-\x9c\x9e-\xf6\xf8-\xfe]*"
)  # of Windows-1252
_JAPANESE = re.compile(r"\x1b\$[@B]")  # its shift in ISO 2022, all of which is ASCII
_WIDE = ["utf_16_le", "utf_16_be"]
_CANDIDATES = [
    "cp1252",
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp1257",
    "cp874",
    "koi8_r",
    "cp866",
    "iso8859_2",
    "cp932",
    "euc_jp",
    "gb18030",
    "big5",
    "cp949",
]
# Windows-1252 is what small texts are, where nothing speaks for another one.
WESTERN = "cp1252"
# Encodings that a declaration names, as the standard reads them (WHATWG Encoding, 4.2).
_READ_AS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
# Codecs that no declaration may name: not wide ones, whose declaration could not be read, nor
# Python's own, some of which take quadratic time.
_NO_CHARSET = re.compile(r"utf-(16|32|7)|idna|punycode|.*escape|undefined|.*_codec|.*mbcs|oem")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text, and what is to be said about it; no text where the bytes are none.

    guess: the encoding that the bytes only look like.
    """

    text: str
    warning: str = ""
    binary: bool = False
    guess: str = ""


def decoded(data: bytes, *, encoding: str | None = None, declared: str | None = None) -> Decoded:
    """Text of `data`; lines end with a newline alone.

    encoding: taken as it is. declared: named by the data themselves, believed where they fit it.
    What cannot be decoded becomes U+FFFD.
    """
    if encoding is not None:
        return _by_name(data, encoding)
    if marked := _marked(data):
        return _by_name(data, marked)
    try:
        text = data.decode(str(declared) if _is_trusted(declared, data) else "utf-8")
    except (LookupError, UnicodeError):
        return _guessed(data)
    if "\0" in text[:_BINARY_LOOK]:
        return _guessed(data)
    return _by_name(data, "iso2022_jp") if _JAPANESE.search(text) else _checked(text)


def declared_as(label: str) -> str | None:
    """The codec that a page means by `label`; None for what is none, or may not be named."""
    try:
        name = codecs.lookup(label.strip()).name
    except (LookupError, ValueError):
        return None
    return None if _NO_CHARSET.match(name) else _READ_AS.get(name, name)


def _is_trusted(declared: str | None, data: bytes) -> bool:
    """Whether to go by the declaration: it may not make other characters of good UTF-8."""
    if declared is None:
        return False
    return not (declared.startswith(("cp125", "iso8859", "koi8", "mac")) and _is_utf8(data))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _marked(data: bytes) -> str | None:
    """The encoding that a byte order mark names."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def _by_name(data: bytes, encoding: str) -> Decoded:
    try:
        return _checked(data.decode(encoding))
    except UnicodeDecodeError as error:
        text = data.decode(encoding, errors="replace")
        name = encoding.removesuffix("-sig").upper()
        return _checked(
            text, f"not {name} at byte {error.start}; what cannot be read was replaced by U+FFFD"
        )


def _guessed(data: bytes) -> Decoded:
    """The text of bytes that are not UTF-8, and say nothing about themselves."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        first = error.start
    else:
        first = 0  # zero bytes: UTF-16 without a mark
    sample = data[max(first - _BEFORE, 0) :][:_LOOK]
    name = "utf-8" if _is_damaged(sample) else _detected(sample)
    if name == "utf-8":
        return _by_name(data, name)
    found = _by_name(data, name)
    how = f"not UTF-8; read as {name}, which it looks like (give its encoding if it is another)"
    return found if found.binary else Decoded(found.text, found.warning or how, guess=name)


def _is_damaged(sample: bytes) -> bool:
    """Whether this is UTF-8 with some bytes that are not."""
    text = sample.decode("utf-8", errors="replace")
    bad = text.count("\N{REPLACEMENT CHARACTER}")
    good = sum(not character.isascii() for character in text) - bad
    surrogates = len(_SURROGATES.findall(sample))
    return "\0" not in text and (good > _MORE * bad or 3 * surrogates == bad > 0)


def _detected(sample: bytes) -> str:
    """What charset-normalizer takes `sample` for; the western one of those that say the same."""
    signs = bytes(byte for byte in sample if byte > 127)
    if b"\0" not in sample and _are_few(len(signs), len(sample)):
        # Too little to tell by: western signs such as é or ’, or bytes that are damaged.
        return WESTERN if _SIGNS.fullmatch(signs) else "utf-8"
    wide = b"\0" in sample  # any two bytes are some character of UTF-16; text of it has zeros
    match = from_bytes(sample, cp_isolation=_WIDE if wide else _CANDIDATES).best()
    if match is None:
        return "utf-8" if wide else WESTERN
    return WESTERN if WESTERN in match.could_be_from_charset else match.encoding


def _are_few(signs: int, size: int) -> bool:
    return signs * _FEW < size or signs == 1 or (signs < _TOO_FEW and signs * 3 <= size)


def _checked(text: str, warning: str = "") -> Decoded:
    """`text` with ends of lines that are newlines, unless it looks like no text at all."""
    if "\0" in text[:_BINARY_LOOK]:
        return Decoded("", binary=True)
    return Decoded(text.replace("\r\n", "\n").replace("\r", "\n"), warning)
