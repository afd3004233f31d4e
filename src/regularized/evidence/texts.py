"""English texts for experiments on language models; nothing is downloaded."""

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from regularized.evidence.experiment import Unavailable

__all__ = ["module_docstrings", "news_articles", "python_topics", "token_blocks"]


def news_articles() -> list[str]:
    """300 short news articles of 2000 and 2001, about 60,000 words: the Lee background corpus that gensim ships.

    General text, for measuring what fine-tuning on something else makes a model forget.

    Raises:
        Unavailable: gensim is not installed, or without its test data.
    """
    spec = find_spec("gensim")  # located, not imported
    if spec is None or spec.origin is None:
        raise Unavailable('gensim is not installed, which ships the news articles: pip install "regularized[language]"')
    file = Path(spec.origin).parent / "test" / "test_data" / "lee_background.cor"
    if not file.is_file():
        raise Unavailable(f"{file} is not there: pip install --force-reinstall --no-deps gensim")
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def python_topics() -> list[str]:
    """The language reference that Python's ``help()`` shows, 80 topics of reST, about 90,000 words; always there.

    A narrow domain with a manner of its own. The text differs a little between versions of Python.

    Examples:
        >>> len(python_topics()) > 50
        True
    """
    topics: dict[str, str] = pydoc_data.topics.topics
    return [topics[name] for name in sorted(topics)]


def module_docstrings(smallest: int = 400) -> list[str]:
    """Docstrings of the standard library's modules, read without importing them; always there.

    Args:
        smallest: leave out shorter ones, in characters.

    Examples:
        >>> len(module_docstrings()) > 20
        True
    """
    texts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(file.read_bytes()))
        if docstring and len(docstring) >= smallest:
            texts.append(docstring)
    return texts


def token_blocks(texts: Sequence[str], tokenize: Callable[[str], Sequence[int] | Tensor], length: int) -> Tensor:
    """Texts one after the other, with an empty line between, cut into blocks of equal length; the rest is dropped.

    Args:
        texts: in the order in which they are joined.
        tokenize: from one text to token ids.
        length: tokens in a block.

    Returns:
        (n, length) int64.

    Raises:
        ValueError: the texts do not fill one block.

    Examples:
        >>> token_blocks(["abc", "de"], lambda text: [ord(c) for c in text], 3)
        tensor([[ 97,  98,  99],
                [ 10,  10, 100]])
    """
    tokens = torch.as_tensor(tokenize("\n\n".join(texts)), dtype=torch.int64)
    blocks = len(tokens) // length
    if blocks == 0:
        raise ValueError(f"the texts have {len(tokens)} tokens and do not fill one block of {length}")
    return tokens[: blocks * length].view(blocks, length)
