"""Text to tokens of SmolLM2 and back, and its chat format."""

import functools
from collections.abc import Iterable, Sequence

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.assets import MissingAsset
from examples.smollm2 import pretrained_file

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START, END = "<|im_start|>", "<|im_end|>"
CONTROL = 3  # the type that GGUF files give to tokens that stand for no text


@functools.cache
def load_tokenizer() -> Tokenizer:
    """The tokenizer of SmolLM2-135M-Instruct.

    Raises:
      MissingAsset: if the package with the weights is not installed, or has another tokenizer.
    """
    return from_reader(pretrained_file())


def from_reader(reader: GGUFReader) -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Raises:
      MissingAsset: it is of another kind than that of SmolLM2.
    """
    said = {}
    for name in ("model", "pre", "tokens", "token_type", "merges"):
        field = reader.fields.get(f"tokenizer.ggml.{name}")
        if field is None:
            raise MissingAsset(f"The file does not say 'tokenizer.ggml.{name}'.")
        said[name] = field.contents()
    if (kind := (said["model"], said["pre"])) != ("gpt2", "smollm"):
        raise MissingAsset(f"The file's tokenizer is of the kind {kind}, not ('gpt2', 'smollm').")
    tokens = said["tokens"]
    control = [t for t, type_ in zip(tokens, said["token_type"], strict=True) if type_ == CONTROL]
    return build(tokens, [tuple(merge.split(" ")) for merge in said["merges"]], control)


def build(
    tokens: Sequence[str], merges: Iterable[tuple[str, str]], control: Iterable[str]
) -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, in which each digit stands alone.

    Args:
      tokens: in the order of their ids.
      merges: pairs of tokens, the first to be merged first.
      control: those of the tokens that stand for no text.

    Texts are text: what looks like a control token in them is not one.
    """
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.encode_special_tokens = True
    return tokenizer


def prompt(tokenizer: Tokenizer, text: str, system: str = SYSTEM) -> list[int]:
    """The tokens after which the model answers a user's text."""
    return [
        *_turn(tokenizer, "system", system),
        *_turn(tokenizer, "user", text),
        tokenizer.token_to_id(START),
        *_ids(tokenizer, "assistant\n"),
    ]


def answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of an answer, and the one that ends it."""
    return [*_ids(tokenizer, text), tokenizer.token_to_id(END)]


def _turn(tokenizer: Tokenizer, role: str, text: str) -> list[int]:
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    return [start, *_ids(tokenizer, f"{role}\n{text}"), end, *_ids(tokenizer, "\n")]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
