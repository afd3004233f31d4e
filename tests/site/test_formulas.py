"""Formulas in comments: shown by browsers themselves, and no way in for markup or long pages."""

import re
import time

import pytest

from regularized.site.formulas import LONGEST_FORMULA, TAGS, mathml
from regularized.site.markdown import LONGEST_HTML, render


def test_a_formula_in_a_comment():
    """Fails when formulas stay LaTeX, prices or code become formulas, or the sanitiser takes MathML away."""
    html = render("The step is $\\eta \\le \\frac{2}{L}$, see `$x$`.\n\n$$\n\\sum_i w_i^2\n$$\n")
    assert '<math display="inline"><mrow><mi>η</mi><mo>≤</mo><mfrac>' in html
    assert '<math display="block">' in html
    assert "<code>$x$</code>" in html
    assert "$5 and $6" in render("it costs $5 and $6")


@pytest.mark.parametrize(
    "latex",
    [
        r"\text{<img/src=x/onerror=alert(1)>}",
        r"\text{</math><script>alert(1)</script>}",
        r"\href{javascript:alert(1)}{x}",
        r"\mathrm{<style><img src=x onerror=alert(1)>}",
        r"x<table><a href=//evil.example>y",
        r"\color{red;background:url(//evil.example)}x",
        r"\class{evil}{x} \style{position:fixed}{y}",
    ],
)
def test_no_markup_gets_in(latex):
    """Fails when what stands in a formula is written into the page as it was typed: the converter does so with text."""
    for html in (mathml(latex), render(f"${latex}$"), render(f"$$\n{latex}\n$$")):
        tags = set(re.findall(r"</?([a-zA-Z0-9]+)", html))
        assert tags <= TAGS | {"p", "code"}, html
        assert not re.search(r"<[^>]*\b(href|src|on\w+|style|class|mathcolor)\s*=", html)


@pytest.mark.parametrize(
    "latex", ["{", "}", r"\frac", r"\frac{1}", r"\begin{matrix}", r"\left(", "^", "_", "&", r"\\", "{" * 400]
)
def test_what_is_no_formula_is_shown_as_typed_or_harmless(latex):
    """Fails when a formula that does not parse is a page that does not load."""
    assert re.fullmatch(r"<(code|math).*</(code|math)>", mathml(latex), re.S)


def test_long_ones_are_bounded():
    """Fails when one comment of many formulas becomes a page of megabytes, or takes seconds."""
    assert mathml("a" * (LONGEST_FORMULA + 1)).startswith("<code>")
    start = time.process_time()
    html = render(("$" + "a" * 400 + "$ ") * 19)
    assert len(html) < LONGEST_HTML
    assert time.process_time() - start < 5.0
