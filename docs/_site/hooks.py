"""What mkdocs builds from the code: catalogue, API reference, navigation, and every measured number.

Markers in a page:

- ``{{ evidence:SLUG }}``: claims with verdicts, what each arm measured, and the learning curves, from the ledger;
- ``{{ bench:SLUG }}``: overhead per step, from the saved bench rows;
- ``{{ compare:FAMILY }}``: the techniques of a problem side by side: claims with effects, cost, what they need;
- ``{{ cheaper }}``: what makes a model smaller or cheaper, side by side: bytes, quality, step, inference, hardware;
- ``{{ guide }}``: for each problem, which technique to try first, what it costs, when not, what was measured;
- ``{{ rates }}``: how often the rule for verdicts errs, and what it sees, from the saved simulation;
- ``{{ comparison_rates }}``: how often `compare` recommends the useless, from the saved simulation;
- ``{{ recipes }}``: how each paper takes part in comparisons on anybody's data, or why it cannot;
- ``{{ example:NAME }}``: what `regularized compare --json` said, from ``docs/examples/NAME.json``;
- ``{{ tabular:METRIC }}``: what `compare` is good for on real tables, from ``docs/examples/tabular.json``;
- ``{{ cost }}``: runs, memory and time of each paper's original set-up, each figure with its source;
- ``{{ contract }}``: the checks of the contract, and what came of them for each paper, from the saved outcomes;
- ``{{ integrations }}``: where each paper's terms train: adapters, processes, shards, half precision, from the same;
- ``{{ catalogue }}``: all papers by problem.

A marker that names an unknown paper fails the build. One whose measurements do not exist yet says so.
"""

import inspect
import json
import logging
import re
import runpy
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from regularized.evidence import bench_rows, contract
from regularized.evidence._plots import save_curves
from regularized.evidence.claims import (
    SHORT,
    Outcome,
    Verdict,
    count_verdicts,
    effect_text,
    interval_text,
    threshold_text,
)
from regularized.evidence.comparison import Log, OneOf, Uniform
from regularized.evidence.comparison.rates import load as load_comparison_rates
from regularized.evidence.ledger import load
from regularized.evidence.numbers import aligned, number
from regularized.evidence.provenance import code_key
from regularized.evidence.rates import load as load_rates
from regularized.evidence.statistics import failure_bound
from regularized.papers.abstract import coverage
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import Entry, find, load_catalogue
from regularized.papers.comparison import candidates, exclusive_pairs, without_recipe
from regularized.papers.cost import Figure, costs, total
from regularized.papers.guide import advise

log = logging.getLogger("mkdocs.hooks.regularized")

_KINDS = (
    "guide|evidence|bench|cost|cheaper|comparison_rates|compare|catalogue|contract|integrations|example|rates|recipes"
    "|tabular"
)
_MARKER = re.compile(rf"\{{\{{ *(?P<kind>{_KINDS})(?::(?P<slug>[a-z_0-9]+))? *\}}\}}")
_ROOT = Path(__file__).parents[2]
_FIRST = ["index.md", "use", "examples", "gallery", "evidence.md", "contract.md", "command_line.md", "papers.md"]
_SECTIONS = {"use": "Use it", "examples": "Worked examples", "gallery": "Gallery"}
_LAST = ["new_paper.md", "architecture.md", "contributing.md", "changelog.md"]
_INCLUDED = {"architecture.md": "ARCHITECTURE.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add generated pages: one for each module, one for each paper, and the documents of the repository's root."""
    _plot.cache_clear()  # `mkdocs serve` builds again when a ledger has changed
    for module in _modules():
        text = f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    for entry in load_catalogue():
        files.append(File.generated(config, f"papers/{entry.slug}.md", content=_paper(entry)))
    for target, source in _INCLUDED.items():
        files.append(File.generated(config, target, content=(_ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "papers.md", content="# The catalogue\n\n{{ catalogue }}\n"))
    for entry in load_catalogue():
        if (plot := _plot(entry.slug)) is not None:
            files.append(File.generated(config, f"assets/{entry.slug}.svg", content=plot))
    return files


def on_nav(nav, config: MkDocsConfig, files: Files):
    """Order the navigation: start, use, evidence, techniques, reference, contributing. Nothing is listed by hand."""
    from mkdocs.structure.nav import Navigation, Section

    pages = {file.src_uri: file.page for file in files.documentation_pages() if file.page is not None}

    def section(title: str, prefix: str) -> list:
        children = [page for uri, page in sorted(pages.items()) if uri.startswith(prefix + "/")]
        return [Section(title, children)] if children else []

    items: list = []
    for name in _FIRST:
        items += [pages[name]] if name in pages else section(_SECTIONS[name], name)
    items += section("Techniques", "techniques") + section("Papers", "papers") + section("Reference", "reference")
    items += [pages[name] for name in _LAST if name in pages]
    flat: list[Page] = []
    for item in items:
        for page in item.children if isinstance(item, Section) else [item]:
            page.parent = item if isinstance(item, Section) else None
            page.previous_page = flat[-1] if flat else None
            if flat:
                flat[-1].next_page = page
            flat.append(page)
    return Navigation(items, flat)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the markers."""
    up = "../" * page.file.src_uri.count("/")

    def fill(match: re.Match[str]) -> str:
        if match["kind"] == "catalogue":
            return _catalogue(up)
        if match["kind"] == "contract":
            return _contract(up)
        if match["kind"] == "integrations":
            return _integrations(up)
        if match["kind"] == "guide":
            return _guide(up)
        if match["kind"] == "rates":
            return _rates()
        if match["kind"] == "cost":
            return _costs(up)
        if match["kind"] == "cheaper":
            return _cheaper(up)
        if match["kind"] == "comparison_rates":
            return _comparison_rates()
        if match["kind"] == "recipes":
            return _recipes(up)
        if match["kind"] == "example":
            return _example(match["slug"])
        if match["kind"] == "tabular":
            return _tabular(match["slug"])
        if match["kind"] == "compare":
            return _compare(match["slug"], up)
        return {"evidence": _evidence, "bench": _bench}[match["kind"]](find(match["slug"]), up)

    return _MARKER.sub(fill, markdown)


def _modules() -> list[str]:
    source = _ROOT / "src"
    names = []
    for path in sorted((source / "regularized").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        # The folders of the papers are experiments, not an interface; private modules are nobody's business.
        if path.name == "__init__.py" or any(part.startswith("_") for part in parts):
            continue
        if parts[1] in ("cli", "site") or (parts[1] == "papers" and len(parts) > 3):
            continue
        names.append(".".join(parts))
    return names


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _table(heads: list[str], rows: list[list[str]], right: frozenset[int] = frozenset()) -> str:
    rule = ["---:" if i in right else "---" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in [heads, rule, *rows])


def _badge(verdict: Verdict) -> str:
    return verdict.value if verdict in (Verdict.OPEN, Verdict.NOT_RUN) else f"**{verdict.value}**"


def _claims(entry: Entry) -> str:
    """The claims; apart from them what is true by construction."""
    claims = [outcome for outcome in entry.outcomes if outcome.claim.kind == "claim"]
    sanity = [outcome for outcome in entry.outcomes if outcome.claim.kind == "sanity"]
    parts = [_judged(claims)]
    if attempts := _attempts(entry.outcomes):
        parts += ["More than one attempt, each judged by itself:", attempts]
    if sanity:
        parts += ["True by construction, or equal at 0 or 100 %: checks of the set-up, not counted.", _judged(sanity)]
    return "\n\n".join(parts)


def _attempts(outcomes: Sequence[Outcome]) -> str:
    """What each attempt says of each claim, where others than the shipped runs speak of it."""
    rows = [
        [
            f"`{outcome.claim.id}`",
            f"`{one.name}`",
            ", ".join(_literal(word) for word in (one.by, one.where, one.when) if word),
            f"{one.seeds[0]} to {one.seeds[-1]}" if one.seeds else "–",
            effect_text(outcome.claim, one.effect),
            interval_text(outcome.claim, one),
            _badge(one.verdict),
            _literal("; ".join(filter(None, [one.beside, one.apart and f"does not count: {one.apart}"]))),
        ]
        for outcome in outcomes
        if len(outcome.attempts) > 1
        for one in outcome.attempts
    ]
    heads = ["claim", "attempt", "who, where, when", "seeds", "improvement", "95 % interval", "verdict", "beside ours"]
    return _table(heads, rows, frozenset({4, 5})) if rows else ""


def _literal(text: str) -> str:
    """A stranger's words as they are: neither Markdown nor HTML."""
    return re.sub(r"[^\w\s.,;:-]", lambda sign: f"&#{ord(sign[0])};", text)


def _judged(outcomes: list[Outcome]) -> str:
    rows = [
        [
            outcome.claim.statement
            + (f" *{outcome.claim.note}*" if outcome.claim.note else "")
            + (" *Threshold set after a pilot on other seeds.*" if outcome.claim.pilot else ""),
            f"`{outcome.claim.method}` over `{outcome.claim.baseline}`; differs in "
            + ", ".join(f"`{name}`" for name in outcome.claim.differs),
            effect_text(outcome.claim, outcome.effect),
            interval_text(outcome.claim, outcome),
            threshold_text(outcome.claim),
            _seeds(outcome),
            _badge(outcome.verdict) + (" (toy)" if outcome.toy else ""),
        ]
        for outcome in outcomes
    ]
    heads = ["claim", "arms", "improvement", "95 % interval", "counts from", "seeds", "verdict"]
    return _table(heads, rows, frozenset({2, 3, 4}))


def _seeds(outcome: Outcome) -> str:
    """How many seeds reach what counts, and the worst of them; what that says of failures nobody saw."""
    if outcome.worst_seed is None:
        return "–"
    n, (_, worst) = len(outcome.effects), outcome.worst_seed
    text = f"{outcome.reaching} of {n} reach it, the worst has {effect_text(outcome.claim, worst)}"
    if outcome.verdict is Verdict.HOLDS:
        text += f"; up to {failure_bound(n - outcome.reaching, n):.0%} of seeds may not"
    return text


_SAMPLING = {
    "resplit": " (each seed splits the same small pool again)",
    "blocks": " (seeds of different blocks have a few in common by chance, for which intervals are wider)",
}


def _measured_on(entry: Entry) -> str:
    """Data and models of the claims, and how the seeds got their data."""
    seen = dict.fromkeys(
        f"{outcome.about['data']}, {outcome.about['model']}" + _SAMPLING.get(outcome.about.get("sampling", ""), "")
        for outcome in entry.outcomes
        if outcome.about
    )
    return "Measured on: " + "; ".join(seen) + "." if seen else ""


def _rates() -> str:
    repetitions, rates = load_rates()
    cases = dict.fromkeys(rate.case for rate in rates)
    share = {(rate.case, rate.rule): f"{rate.share:.1%} ± {rate.error:.1%}" for rate in rates}
    rows = [[case, share[case, "this rule"], share[case, "first edition"]] for case in cases]
    return (
        _table(["ten seeds", "this rule: holds", "first edition: holds"], rows, frozenset({1, 2}))
        + f"\n\n*Made by `regularized rates --save` with {repetitions} claims a case.*"
    )


def _costs(up: str) -> str:
    found = costs()
    rows = [
        [
            f"[{cost.slug}]({up}techniques/{cost.slug}.md)",
            f"{cost.arms} x {cost.seeds} = {cost.runs}",
            "yes" if cost.gpu else "no",
            _figure(cost.gigabytes, "GB"),
            _figure(cost.hours, "hours"),
        ]
        for cost in found
    ]
    table = _table(["paper", "arms x seeds = runs", "asks for a GPU", "memory of a run", "time of all runs"], rows)
    return f"{table}\n\n*{total(found)}. Made by `regularized cost --scale paper`.*"


def _figure(figure: Figure, unit: str) -> str:
    return f"unknown: {figure.source}" if figure.value is None else f"{figure} {unit}: {figure.source}"


def _comparison_rates() -> str:
    rates = load_comparison_rates()
    rows = [[r.case, str(r.splits), r.rule, f"{100 * r.share:.1f} %", str(r.repetitions)] for r in rates]
    heads = ["what is true", "splits", "rule", "recommends something", "simulated"]
    return _table(heads, rows, right=frozenset({1, 3, 4}))


def _example(name: str) -> str:
    """A saved comparison: what was compared, the table, and what is recommended."""
    path = _ROOT / "docs" / "examples" / f"{name}.json"
    if not path.is_file():
        return f"*Not run yet: `{path.name}` is what the command above writes.*"
    found = json.loads(path.read_text(encoding="utf-8"))
    metric, guards = found["metric"], list(found["arms"][0]["guards"])
    rows = []
    for arm in found["arms"]:
        mean = sum(arm["values"]) / len(arm["values"])
        judged = ["", "", ""]
        if arm["effect"] is not None:
            low, high = (number(end, 3) for end in arm["interval"])
            judged = [f"{arm['effect']:+.3g}", f"{low} to {high}", f"{arm['p_value']:.3f}"]
        marks = [number(arm["guards"][guard]) + ("!" if guard in arm["worse"] else "") for guard in guards]
        rows.append([f"`{arm['name']}`", number(mean), *judged, *marks, f"{arm['cost_ratio']:.2f} x"])
    heads = ["", f"{metric['name']} ({metric['unit']})", "better by", "95 % interval", "p", *guards, "step"]
    parts = ", ".join(f"{size} {part}" for part, size in found["data"]["sizes"].items())
    return (
        f"{found['data']['name']} ({parts}); {found['model']}; {found['epochs']} epochs, {found['trials']} trials for "
        f"each arm in each of {found['splits']} splits.\n\n"
        + _table(heads, rows, right=frozenset(range(1, len(heads))))
        + f"\n\n**{found['recommendation']['sentence']}**"
    )


def _tabular(metric: str) -> str:
    """What the benchmark that made the numbers says of them; the first metric of each task, or one by name."""
    path = _ROOT / "docs" / "examples" / "tabular.json"
    if not path.is_file():
        return "*Not run yet: the command above makes it.*"
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    said = runpy.run_path(str(_ROOT / "benchmarks" / "tabular_compare.py"))["report"]
    return said(results, ["accuracy", "rmse"] if metric == "accuracy" else [metric])


def _recipes(up: str) -> str:
    rows = []
    for candidate in candidates():
        recipe, paper = candidate.recipe, candidate.module_name.split(".")[-2]
        name = f"[{recipe.name}]({up}papers/{paper}.md)" if candidate.module_name.endswith(".recipe") else recipe.name
        problems = ", ".join(sorted(recipe.problems)).replace("_", " ")
        space = ", ".join(f"{key} {_range(values)}" for key, values in recipe.space.items()) or "nothing of its own"
        needs = ", ".join(sorted(need.value for need in recipe.needs)) or "nothing"
        rows.append([name, _cell(recipe.title), problems, space, needs, _cell(recipe.source)])
    for slug, reason in without_recipe().items():
        rows.append([f"[{slug}]({up}papers/{slug}.md)", f"takes no part: {_cell(reason)}", "", "", "", ""])
    return _table(["name", "what it is", "problems", "is tuned", "needs", "where the ranges come from"], rows)


def _range(values: Log | Uniform | OneOf) -> str:
    return "/".join(map(str, values.values)) if isinstance(values, OneOf) else f"{values.low:g} to {values.high:g}"


def _evidence(entry: Entry, up: str) -> str:
    ledger = load(entry.ledger)
    if ledger is None:
        return (
            f"*Nothing is in the ledger yet. `regularized reproduce {entry.slug}` measures it on your machine.*\n\n"
            + _claims(entry)
        )
    result = ledger.to_result(entry.card.claims, module_name=entry.module_name("experiment"))
    named = {claim.metric for claim in entry.card.claims}
    metrics = [*sorted(named & set(result.metrics)), *(name for name in result.metrics if name not in named)]
    rows = []
    for arm in result.arms:
        cells = [f"`{arm}`"]
        for metric in metrics:
            values = [value for value in result.values(arm, metric) if value is not None]
            show = aligned(values)
            cells.append(
                f"{show(sum(values) / len(values))} ({show(min(values))} to {show(max(values))})" if values else "–"
            )
        rows.append(cells)
    environment = ledger.environment
    stale = ledger.is_stale(entry.code_key)
    why = f" {ledger.why_seeds}" if ledger.why_seeds else ""
    lines = [
        _claims(entry),
        "",
        f"{_measured_on(entry)} Seeds {ledger.seeds[0]} to {ledger.seeds[-1]}.{why}",
        "",
        f'??? note "All measurements: mean over {len(ledger.seeds)} seeds, lowest to highest"',
        "",
        *(
            "    " + line
            for line in _table(["arm", *metrics], rows, frozenset(range(1, len(metrics) + 1))).splitlines()
        ),
        "",
    ]
    if _plot(entry.slug) is not None:
        lines += [f"![Learning curves of {entry.slug}]({up}assets/{entry.slug}.svg)", ""]
    lines += [
        f"*Made by `regularized reproduce {entry.slug} --scale {ledger.scale}`, from the "
        f"ledger in the repository (torch {environment.get('torch', '?')}, {environment.get('cpu', '?')}, "
        f"commit {str(environment.get('commit', ''))[:9] or 'of the release'})"
        + ("; the code of the experiment has changed since." if stale else ".")
        + "*"
    ]
    return "\n".join(lines)


def _bench(entry: Entry, up: str) -> str:
    saved = bench_rows.load(entry.folder / "bench.json")
    if saved is None:
        return f"*Not measured yet: `regularized bench {entry.slug}` measures it on your machine.*"
    rows = [
        [
            row.size + (f" ({row.note})" if row.note else ""),
            number(row.plain_ms),
            number(row.method_ms),
            f"{row.ratio:.2f} ({row.ratio_interval[0]:.2f} to {row.ratio_interval[1]:.2f})",
            "–" if row.floor is None else f"{row.floor:.2f}",
            "–" if row.peak_memory_ratio is None else f"{row.peak_memory_ratio:.2f}",
        ]
        for row in saved["rows"]
    ]
    heads = ["size", "plain step, ms", "with it, ms", "ratio (from, to)", "floor", "peak memory"]
    if any(row.size_bytes for row in saved["rows"]):
        heads.append("bytes kept")
        for cells, row in zip(rows, saved["rows"], strict=True):
            cells.append("–" if row.size_ratio is None else f"{row.size_ratio:.2f}")
    environment = saved["environment"]
    processes = min(row.processes for row in saved["rows"])
    interval = f"lowest and highest of {processes} fresh processes" if processes > 1 else "95 % interval in one process"
    return (
        _table(heads, rows, frozenset(range(1, len(heads))))
        + f"\n\n*Made by `regularized bench {entry.slug} --save` on {saved['measured']}: steps interleaved, "
        f"{interval}, one thread, {environment['cpu']}, torch {environment['torch']}; memory as ratio of the peaks of "
        "fresh processes.*"
    )


def _contract(up: str) -> str:
    """The checks in words; papers x checks; why what does not apply does not."""
    kinds = {
        "terms": contract.CHECKS,
        "procedures": contract.PROCEDURE_CHECKS,
        "diagnostics": contract.DIAGNOSTIC_CHECKS,
    }
    words = [
        [f"`{name}`", kind, inspect.getdoc(check).split("\n\n")[0].replace("\n", " ")]
        for kind, checks in kinds.items()
        for name, check in checks.items()
    ]
    names = contract.all_checks()
    rows, reasons, stale, made = [], {}, [], set()
    for entry in sorted(load_catalogue(), key=lambda entry: entry.slug):
        if not entry.implemented:
            continue
        saved = contract.load(entry.folder / "contract.json")
        page = f"[{entry.slug}]({up}techniques/{entry.slug}.md)"
        if saved is None:
            rows.append([page, *("not run" for _ in names)])
            continue
        made.add(f"{saved['made']}, torch {saved['environment']['torch']}, {saved['environment']['device']}")
        if saved["code_key"] != code_key(entry.module_name("contract")):
            stale.append(entry.slug)
        rows.append([page, *(_outcomes([o for o in saved["outcomes"] if o.check == name]) for name in names)])
        for outcome in saved["outcomes"]:
            if outcome.status != "passed":
                where = reasons.setdefault((outcome.check, outcome.status, outcome.reason), {})
                where.setdefault(entry.slug, []).append(outcome.subject)
    why = [
        [
            f"`{check}`",
            status.replace("_", " "),
            reason,
            "; ".join(f"{slug} ({', '.join(subjects)})" for slug, subjects in where.items()),
        ]
        for (check, status, reason), where in reasons.items()
    ]
    return "\n\n".join(
        [
            "## The checks",
            _table(["check", "of", "what it asks"], words),
            "## What came of them",
            "Passed for so many of the paper's subjects; – where it applies to none of them; empty where the paper has "
            "no subject of a kind that is asked this.",
            _table(["paper", *(name.replace("_", " ") for name in names)], rows, frozenset(range(1, len(names) + 1))),
            "*Made by `regularized contract --save` ("
            + "; ".join(sorted(made))
            + "). The test suite runs all of it again, and fails where this table says otherwise."
            + (f" The code of {', '.join(stale)} has changed since." if stale else "")
            + "*",
            "## Why a check does not apply",
            _table(["check", "", "reason", "subjects"], why),
            "## Who takes part in comparisons",
            "`regularized compare` asks which technique helps on given data. Some enter by a recipe.",
            _table(["paper", "in a comparison"], _comparable(up)),
            "## Pairs",
            "Terms are summed: two techniques in one loss give the sum of their gradients, and neither touches what "
            "the other remembers. A check runs all pairs of recipes that add to the task. These exclude each other:",
            _table(["pairs", "why"], _exclusive()),
        ]
    )


# What a reader asks for, and the check that answers it.
_WHERE = {
    "plain loop": "it_bites",
    "`Trainer`": "resume",
    "Accelerate DDP": "trainer_processes",
    "FSDP2": "fsdp2",
    "bf16": "bf16",
    "fp16": "fp16",
    "`torch.compile` of its part": "compile",
    "of a step": "compile_step",
    "plain model at the end": "merge",
}


def _integrations(up: str) -> str:
    """Papers with terms x where they train; the reasons of each no; and the papers that train in loops of their own."""
    rows, reasons, apart = [], {}, []
    for entry in sorted(load_catalogue(), key=lambda entry: entry.slug):
        saved = contract.load(entry.folder / "contract.json") if entry.implemented else None
        if saved is None:
            continue
        page = f"[{entry.slug}]({up}techniques/{entry.slug}.md)"
        terms = {o.subject for o in saved["outcomes"] if o.check == "trainer_processes"}
        if not terms:
            apart.append(page)
            continue
        cells = []
        for column, check in _WHERE.items():
            of = [o for o in saved["outcomes"] if o.check == check and o.subject in terms]
            cells.append(_outcomes(of) if of else "not run")
            for outcome in of:
                if outcome.status != "passed":
                    reasons.setdefault((column, outcome.reason), {})[entry.slug] = None
        rows.append([page, *cells])
    why = [[column, reason, ", ".join(slugs)] for (column, reason), slugs in reasons.items()]
    return "\n\n".join(
        [
            _table(["paper", *_WHERE], rows, frozenset(range(1, len(_WHERE) + 1))),
            "Passed for so many of the paper's settings; – where none does, for a reason that stands below.",
            f"A loop of their own, or nothing to train: {', '.join(apart)}.",
            "## Why not",
            _table(["where", "reason", "papers"], sorted(why, key=lambda row: list(_WHERE).index(row[0]))),
        ]
    )


def _comparable(up: str) -> list[list[str]]:
    """Each implemented paper: the recipes by which it enters comparisons, or why it cannot."""
    entering = {}
    for candidate in candidates():
        entering.setdefault(candidate.module_name.split(".")[-2], []).append(f"enters as `{candidate.recipe.name}`")
    told = {slug: f"cannot: {_cell(reason)}" for slug, reason in without_recipe().items()}
    told |= {e.slug: ", ".join(entering[e.slug]) for e in load_catalogue() if e.implemented and e.slug in entering}
    return [[f"[{slug}]({up}techniques/{slug}.md)", told[slug]] for slug in sorted(told)]


def _exclusive() -> list[list[str]]:
    """Pairs of recipes that cannot be one training, by the reason."""
    by_reason = {}
    for pair, reason in exclusive_pairs().items():
        alone = reason.endswith("a training of its own") or reason.endswith("each a training of its own")
        why = "a training of its own" if alone else "each takes the place of the task's loss"
        by_reason.setdefault(why, []).append(" + ".join(f"`{name}`" for name in sorted(pair)))
    return [[", ".join(sorted(pairs)), why] for why, pairs in by_reason.items()]


def _outcomes(of: list[contract.Outcome]) -> str:
    """One cell: how many subjects passed, of how many that are asked."""
    applicable = [outcome for outcome in of if outcome.status != "not_applicable"]
    passed = sum(outcome.status == "passed" for outcome in of)
    if not applicable:
        return "–" if of else ""
    return f"{passed} of {len(of)}" if passed < len(of) else str(passed)


_COLUMNS = {
    "holds": {Verdict.HOLDS},
    "smaller than promised": {Verdict.SMALLER},
    "no effect shown, or opposite": {Verdict.NO_EFFECT, Verdict.OPPOSITE},
    "open, or contested": {Verdict.OPEN, Verdict.CONTESTED},
}


def _compare(family: str, up: str) -> str:
    """One row a technique: nothing here is typed in."""
    if family not in FAMILIES:
        raise ValueError(f"{{{{ compare:{family} }}}}: there is no problem {family!r}; there are {sorted(FAMILIES)}")
    rows = []
    for entry in load_catalogue():
        if not entry.implemented or family not in entry.card.families:
            continue
        measured = {
            heading: "<br>".join(
                f"{outcome.claim.statement.rstrip('.')}: {effect_text(outcome.claim, outcome.effect)} "
                f"({interval_text(outcome.claim, outcome)})"
                for outcome in entry.outcomes
                if outcome.verdict in verdicts and outcome.claim.kind == "claim"
            )
            for heading, verdicts in _COLUMNS.items()
        }
        saved = bench_rows.load(entry.folder / "bench.json")
        cost = [
            f"{row.ratio:.2f} x step"
            + ("" if row.peak_memory_ratio is None else f", {row.peak_memory_ratio:.2f} x memory")
            + ("" if row.size_ratio is None else f", {row.size_ratio:.2f} x bytes kept")
            + f": {row.size}"
            + (f" ({row.note})" if row.note else "")
            for row in (saved["rows"] if saved else ())
        ]
        rows.append(
            [
                f"[{entry.slug}]({up}techniques/{entry.slug}.md)",
                f"{entry.card.when_to_use} **Not:** {entry.card.when_not_to_use}",
                *(text or "–" for text in measured.values()),
                "<br>".join(cost) or "not measured yet",
            ]
        )
    return _table(["technique", "use it for", *_COLUMNS, "cost of a step"], rows)


def _guide(up: str) -> str:
    """A section a problem; see :mod:`regularized.papers.guide`."""
    lines = []
    for family, words in FAMILIES.items():
        advice = advise(family)
        if not advice:
            continue
        rows = [
            [
                "–" if one.rank is None else str(one.rank),
                f"[{one.entry.slug}]({up}techniques/{one.entry.slug}.md): {one.entry.card.when_to_use}",
                one.entry.card.when_not_to_use,
                _lines([_stated(o) for o in (one.kept, one.broken) if o is not None]),
                "not measured yet" if one.cost is None else f"{one.cost[0]:.2f} to {one.cost[1]:.2f} x",
            ]
            for one in advice
        ]
        lines += [f"## {words[0].upper()}{words[1:]}", "", _table(_GUIDE, rows, frozenset({0})), ""]
        without = [e for e in load_catalogue() if family in e.card.families and not e.implemented]
        if without:
            listed = ", ".join(f"[{entry.slug}]({up}papers/{entry.slug}.md)" for entry in without)
            lines += [f"Without code that runs yet: {listed}.", ""]
    return "\n".join(lines)


_GUIDE = ["try", "technique, and when", "when not", "what we measured", "a step"]


def _stated(outcome: Outcome) -> str:
    claim = outcome.claim
    measured = f"{effect_text(claim, outcome.effect)} ({interval_text(claim, outcome)})"
    return f"{_badge(outcome.verdict)}: {claim.statement.rstrip('.')}, {measured}"


# Which claims and which rows of a bench speak of what: by words that their metrics and sizes have.
_QUALITY = ("accuracy", "loss", "perplexity", "nll")
_BYTES = ("bits", "bytes", "megabytes")
_INFERENCE = ("inference", "forward pass")


def _cheaper(up: str) -> str:
    """One row for each paper whose card names the hardware on which it saves something; nothing here is typed in."""
    rows = []
    for entry in load_catalogue():
        if not entry.card.hardware:
            continue
        name = f"[{entry.slug}]({up}{'techniques' if entry.implemented else 'papers'}/{entry.slug}.md)"
        if not entry.implemented:
            rows.append([name, "card only, nothing runs yet", "–", "–", "–", entry.card.hardware])
            continue
        saved = bench_rows.load(entry.folder / "bench.json")
        timed = saved["rows"] if saved else []
        measured = [o for o in entry.outcomes if o.effect is not None and o.claim.kind == "claim"]
        files = [
            f"{row.size_ratio:.2f} x, {_size(row.size_bytes[0])} to {_size(row.size_bytes[1])}: {row.size}"
            for row in timed
            if row.size_bytes is not None
        ]
        peaks = [
            f"peak of a step {row.peak_memory_ratio:.2f} x: {row.size}"
            for row in timed
            if row.peak_memory_ratio is not None and row.peak_memory_ratio < 1.0 and not _is_inference(row)
        ]
        # What the method may cost beside the model without it: claims of "not worse by more than"; else all there are.
        quality = [o for o in measured if any(word in o.claim.metric for word in _QUALITY)]
        quality = [o for o in quality if (o.claim.smallest_effect or 0.0) < 0.0] or quality
        rows.append(
            [
                name,
                _lines(
                    [*files, *(_said(o) for o in measured if _is_size(o)), *peaks],
                    nothing="not smaller, or not measured",
                ),
                _lines([_said(o) for o in quality]),
                _lines([_cost(row) for row in timed if not _is_inference(row)]),
                _lines(
                    [_cost(row) for row in timed if _is_inference(row)],
                    nothing="as the model without it, or not measured",
                ),
                entry.card.hardware,
            ]
        )
    heads = ["technique", "size", "quality, beside the model without it", "a step", "inference", "hardware"]
    return _table(heads, rows)


def _lines(texts: list[str], *, nothing: str = "not measured yet") -> str:
    return "<br>".join(texts) or nothing


def _is_size(outcome: Outcome) -> bool:
    return any(word in outcome.claim.metric for word in _BYTES)


def _is_inference(row: bench_rows.BenchRow) -> bool:
    return row.size.startswith(_INFERENCE)


def _size(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _said(outcome: Outcome) -> str:
    claim = outcome.claim
    return (
        f"`{claim.method}` over `{claim.baseline}`: {effect_text(claim, outcome.effect)} "
        f"({interval_text(claim, outcome)}), {claim.metric.replace('_', ' ')}; {_badge(outcome.verdict)}"
    )


def _cost(row: bench_rows.BenchRow) -> str:
    return f"{row.ratio:.2f} x: {row.size}"


def _catalogue(up: str) -> str:
    lines = []
    for family, words in FAMILIES.items():
        entries = [entry for entry in load_catalogue() if entry.card.families[0] == family]
        if not entries:
            continue
        rows = [
            [
                f"[{entry.card.title}]({up}papers/{entry.slug}.md)",
                entry.card.problem,
                "runs" if entry.implemented else "card only",
                ", ".join(f"{n} {SHORT[verdict]}" for verdict, n in count_verdicts(entry.outcomes).items() if n)
                or "no claims yet",
            ]
            for entry in sorted(entries, key=lambda entry: (not entry.implemented, entry.card.title))
        ]
        lines += [
            f"## {words[0].upper()}{words[1:]}",
            "",
            _table(["paper", "your problem", "code", "claims"], rows),
            "",
        ]
    return "\n".join(lines)


def _paper(entry: Entry) -> str:
    card = entry.card
    facts = [
        ["first posted", card.date.isoformat()],
        ["venue", card.venue or "–"],
        ["authors", ", ".join(card.authors) or (str(card.authors_count) if card.authors_count else "–")],
        ["arXiv", f"[{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else "–"],
        ["changes", card.changes],
        ["needs", ", ".join(card.needs) or "nothing from the loop"],
        *([["saves on", card.hardware]] if card.hardware else []),
    ]
    if card.official is not None:
        licence = card.official.licence or "licence not stated"
        facts.append(
            ["official code", f"[{card.official.repository}](https://github.com/{card.official.repository}), {licence}"]
        )
    parts = [f"# {card.title}", f"*{card.problem}*", card.summary.strip(), _table(["", ""], facts)]
    if entry.implemented:
        parts.append(f"**Runs here.** [How to use it](../techniques/{entry.slug}.md).")
    else:
        parts.append("**No runnable code yet.** The claims below are the paper's, waiting for an experiment.")
    parts += [
        f"**When to use it.** {card.when_to_use}",
        f"**When not.** {card.when_not_to_use}",
    ]
    if card.official is not None and card.official.note:
        parts.append(f"**Paper and official code.** {card.official.note}")
    if card.official is not None and card.official.blockers:
        blockers = card.official.to_dict()["blockers"]
        parts.append("**Known blockers of the official code**, as reported there:")
        parts.append("\n".join(f"- [issue {b['issue']}]({b['url']}): {b['breaks']}" for b in blockers))
    parts += ["## Claims", _claims(entry) if entry.outcomes else "No claim is stated yet."]
    if entry.abstract:
        rows = [
            [_cell(s.says), ", ".join(f"`{name}`" for name in s.tested_by) or f"not tested: {_cell(s.untested)}"]
            for s in entry.abstract
        ]
        parts += [
            "## What the abstract claims",
            f"{coverage(entry.abstract)}.",
            _table(["it says", "our claims"], rows),
        ]
    reported = [
        [claim.id, r.setting, number(r.baseline), number(r.method), r.source]
        for claim in card.claims
        for r in claim.reported
    ]
    if reported:
        heads = ["claim", "setting", "baseline", "method", "source"]
        parts += ["## The paper's own numbers", _table(heads, reported, frozenset({2, 3}))]
    if card.unconfirmed:
        parts += ["## Unconfirmed", "\n".join(f"- {line}" for line in card.unconfirmed)]
    return "\n\n".join(parts) + "\n"


@cache
def _plot(slug: str) -> str | None:
    """Learning curves as SVG, which take longer than all else of a page: drawn once a build."""
    entry = find(slug)
    ledger = load(entry.ledger)
    if ledger is None:
        return None
    result = ledger.to_result(entry.card.claims, module_name=entry.module_name("experiment"))
    with tempfile.TemporaryDirectory() as folder:
        plots = save_curves(result, Path(folder), formats=["svg"])
        return plots[0].read_text(encoding="utf-8") if plots else None
