"""Two styles of English from packages of Debian: The Devil's Dictionary, and the King James Bible.

Each is questions and answers, so that a chat model can learn to answer in that style. Both texts
are in the public domain.
"""

import dataclasses
import gzip
import io
import itertools
import re
import tarfile
from collections import Counter
from collections.abc import Iterator

import numpy as np

from examples.assets import downloaded

DEVIL = "pool/main/d/dict-devil/dict-devil_1.0-13.1_all.deb"
DEVIL_SHA256 = "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154"
BIBLE = "pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb"
BIBLE_SHA256 = "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a"

QUESTIONS = ("What is {}?", "Define: {}", "Tell me about {}.")
"""The same for both styles, so that a question does not say in what style its answer is."""
LONGEST = 160  # letters of an answer


@dataclasses.dataclass(frozen=True)
class Style:
    """Pairs of a question and its answer, those to train on and those that are held out."""

    name: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


def devil() -> Style:
    """Definitions of Ambrose Bierce's Devil's Dictionary (1911), without his verses.

    Raises:
      MissingAsset: if the package is neither in the cache folder nor to be had.
    """
    package = downloaded(DEVIL, DEVIL_SHA256)
    text = gzip.decompress(deb_member(package, "./usr/share/dictd/devil.dict.dz"))
    index = deb_member(package, "./usr/share/dictd/devil.index")
    return style_of("devil", definitions(dict_entries(text, index)))


def bible() -> Style:
    """Verses of the King James Bible (1611), each asked for by a word that is in it.

    Raises:
      MissingAsset: if the package is neither in the cache folder nor to be had.
    """
    package = downloaded(BIBLE, BIBLE_SHA256)
    text = windows(deb_member(package, "./usr/lib/bible.data")).decode("ascii")
    return style_of("bible", by_topic(parse_verses(text)), most=1000)


def style_of(name: str, answers: list[tuple[str, str]], most: int | None = None) -> Style:
    """The style from pairs of a word and its answer, in a fixed shuffle; a tenth is held out."""
    order = np.random.default_rng(0).permutation(len(answers))[:most]
    pairs = tuple(
        (QUESTIONS[i % len(QUESTIONS)].format(answers[j][0]), answers[j][1])
        for i, j in enumerate(order)
    )
    return Style(name, train=pairs[len(pairs) // 10 :], test=pairs[: len(pairs) // 10])


def definitions(entries: dict[str, str]) -> list[tuple[str, str]]:
    """Pairs of a word and the first sentences of its definition, such as ``ABSENT, adj. ...``."""
    found = []
    for text in entries.values():
        paragraph = " ".join(text.strip().split("\n\n")[0].split())
        match = re.match(r"([A-Z][A-Z' -]+), ([a-z.]+) ", paragraph)
        answer = first_sentences(paragraph)
        if match and len(answer) > match.end() + 10:
            found.append((match[1].lower(), answer))
    return found


def first_sentences(text: str, longest: int = LONGEST) -> str:
    """As many whole sentences as fit; none where the first is too long."""
    ends = [match.end() for match in re.finditer(r"[a-z][.!?]['\"]?(?= [A-Z\"']|$)", text)]
    return text[: max((end for end in ends if end <= longest), default=0)]


VERSE = re.compile(r"([1-3]?[A-Z][a-zA-Z]*)(\d+):(\d+) (.*)")


def parse_verses(text: str) -> list[str]:
    """Texts of the verses, from lines ``Ge1:1 In the beginning ...``, each once."""
    matches = (VERSE.fullmatch(line) for line in text.splitlines())
    return list(dict.fromkeys(match[4] for match in matches if match))


NOUN = re.compile(r"\b(?:the|of|my|thy|his|their|an?) ([a-z]{4,})\b")


def by_topic(verses: list[str]) -> list[tuple[str, str]]:
    """Pairs of a word and a verse that has it, for verses that are not too long.

    The word stands where a noun does, and is the rarest of those that 20 verses have.
    """
    words = [sorted(set(NOUN.findall(verse))) for verse in verses]
    count = Counter(word for of_verse in words for word in of_verse)
    return [
        (min(common, key=count.__getitem__), verse)
        for verse, of_verse in zip(verses, words, strict=True)
        if len(verse) <= LONGEST and (common := [w for w in of_verse if count[w] >= 20])
    ]


# --- the formats that the texts are in ---


def deb_member(package: bytes, name: str) -> bytes:
    """A file of a Debian package, which is an ar archive with a tar archive in it."""
    for member, content in ar_members(package):
        if member.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                file = tar.extractfile(name)
                if file is None:
                    raise KeyError(f"{name!r} is no file in the package.")
                return file.read()
    raise KeyError("The package has no data.tar.")


def ar_members(archive: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an ar archive's members.

    Raises:
      ValueError: it is no ar archive, or is cut off.
    """
    if not archive.startswith(b"!<arch>\n"):
        raise ValueError("This is no ar archive.")
    at = 8
    while at < len(archive):
        header = archive[at : at + 60]
        if header[58:] != b"`\n":
            raise ValueError(f"The ar archive has no header at byte {at}.")
        name, size = header[:16].decode().rstrip().rstrip("/"), int(header[48:58])
        at += 60
        if at + size > len(archive):
            raise ValueError(f"The ar archive ends within {name!r}.")
        yield name, archive[at : at + size]
        at += size + size % 2


BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def dict_entries(text: bytes, index: bytes) -> dict[str, str]:
    """Entries of a dictionary of dictd by their headwords, without those that are about itself.

    Each line of the index is a headword, where its entry starts and how long it is, as numbers
    with the digits of base64.
    """

    def number(digits: str) -> int:
        value = 0
        for digit in digits:
            value = 64 * value + BASE64.index(digit)
        return value

    entries = {}
    for line in index.decode().splitlines():
        word, start, length = line.split("\t")[:3]
        if not word.startswith("00"):
            entries[word] = text[number(start) : number(start) + number(length)].decode()
    return entries


def windows(data: bytes) -> bytes:
    """The text of a file of the Bible Retrieval System.

    At byte 0x58 it has the number of windows, then where each of them starts and the last one
    ends; each is compressed alone.

    Raises:
      ValueError: it is another file.
    """
    if not data.startswith(b"EC02"):
        raise ValueError("This is no compressed file of the Bible Retrieval System.")
    count = int.from_bytes(data[0x58:0x5C])
    starts = np.frombuffer(data, ">u4", count + 1, 0x5C)
    return b"".join(lzw(data[a:b]) for a, b in itertools.pairwise(starts))


def lzw(data: bytes, widest: int = 16) -> bytes:
    """Decompresses what Unix' ``compress`` has written, without its header of three bytes.

    Codes have 9 bits at first, and one more each time that the table is full. They are written in
    groups of eight, and a group is filled up where the width changes. Code 256 empties the table.

    Raises:
      ValueError: if a code is not in the table.
    """
    empty = [*(bytes([i]) for i in range(256)), b""]
    table, width, before, out = list(empty), 9, b"", []
    at = changed = 0  # bits: where the next code is, and where codes of its width begin
    while at + width <= 8 * len(data):
        byte, bit = divmod(at, 8)
        code = int.from_bytes(data[byte : byte + 4], "little") >> bit & (1 << width) - 1
        at += width
        wider = False
        if code == 256:
            table, before = list(empty), b""
        else:
            if code > len(table) or (code == len(table) and not before):
                raise ValueError(f"Code {code} is not in the table of {len(table)}.")
            text = table[code] if code < len(table) else before + before[:1]
            if before and len(table) < 1 << widest:
                table.append(before + text[:1])
                wider = len(table) == 1 << width and width < widest
            before = text
            out.append(text)
        if wider or code == 256:
            group = 8 * width
            at = changed = changed + -(-(at - changed) // group) * group
            width = width + 1 if wider else 9
    return b"".join(out)
