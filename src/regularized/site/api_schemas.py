"""What the API answers, as OpenAPI describes it."""

import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from regularized.evidence.claims import Kind, Verdict


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class Code(BaseModel):
    """Code of a paper, and its state."""

    url: str = Field(description="The authors' code; empty if none is known.")
    state: Literal["runs here", "authors' code only", "none known"]


class Verdicts(BaseModel):
    """How many claims have each verdict."""

    holds: int
    smaller_than_promised: int
    no_effect_shown: int
    opposite: int
    open: int
    contested: int = Field(description="Attempts to measure it disagree.")
    not_run: int


class PaperItem(BaseModel):
    """A paper in a list."""

    slug: str
    title: str
    url: str = Field(description="Its page.")
    date: datetime.date = Field(description="First posted.")
    arxiv: str
    authors: list[str]
    authors_count: int
    organization: str
    venue: str
    problem: str
    summary: str
    families: list[str]
    tags: list[str]
    code: Code
    implemented: bool = Field(description="Whether it has code that runs here.")
    verdicts: Verdicts
    votes: int
    comments: int
    listed_comments: int = Field(description="Comments where it was first listed.")


class ReportedNumber(BaseModel):
    """A number that the paper reports itself."""

    setting: str
    baseline: float | None
    method: float | None
    source: str


class AttemptItem(BaseModel):
    """What one attempt says of a claim: the runs that ship, or those of another machine or person."""

    name: str = Field(description="shipped, or the name of the attempt.")
    verdict: Verdict
    effect: float | None
    interval: list[float | None]
    seeds: list[int]
    by: str = Field(description="Who made it.")
    where: str = Field(description="On what machine.")
    when: str = Field(description="The day on which its last run ended.")
    beside: str = Field(description="What is independent of the shipped runs (seeds, machine, versions) and what not.")
    apart: str = Field(description="Why it has no say in whether the claim is contested; empty where it has one.")


class ClaimItem(BaseModel):
    """A claim, and what was measured."""

    id: str
    statement: str
    verdict: Verdict
    metric: str
    unit: str
    direction: Literal["higher", "lower"]
    kind: Kind = Field(description="sanity: true by construction, not counted.")
    relative: bool = Field(description="Whether the effect is a share of the baseline.")
    differs: list[str] = Field(description="Settings in which the two arms may differ.")
    baseline: str
    method: str
    smallest_effect: float | None
    effect: float | None = Field(description="Mean improvement over seeds; positive is better.")
    interval: list[float | None] = Field(description="95 % interval of the effect; two numbers or nulls.")
    p_value: float | None = Field(description="Corrected for the number of claims of the paper.")
    worst_seed: dict[str, float] | None = Field(description="The seed with the smallest effect, and that effect.")
    seeds: int
    reaching: int = Field(description="Seeds that reach the smallest effect that counts.")
    may_fail: float | None = Field(description="Share of seeds that may not reach it, for a claim that holds.")
    pilot: bool = Field(description="Whether the smallest effect was set after a pilot on other seeds.")
    counts_in_words: str = Field(description="What the smallest effect asks for, such as: may lose at most 2 %.")
    data: str
    model: str
    sampling: str = Field(
        description="fresh: each seed has data of its own; resplit: one small pool, split again; blocks: seeds of "
        "different blocks have a few data in common by chance, and the interval is wider for it."
    )
    toy: bool = Field(description="Data or model are small where the paper's are not.")
    scale: str
    problem: str
    note: str
    attempts: list[AttemptItem] = Field(description="What each attempt says, the shipped runs first.")
    reported: list[ReportedNumber]


class Sentence(BaseModel):
    """A claim of a paper's abstract."""

    says: str
    tested_by: list[str] = Field(description="Claims here that test it; empty where none does.")
    untested: str = Field(description="Why none does.")


class PaperPage(PaperItem):
    """All that is known of a paper."""

    abstract: str
    abstract_claims: list[Sentence]
    changes: str
    needs: list[str]
    when_to_use: str
    when_not_to_use: str
    unconfirmed: list[str]
    missing: list[str] = Field(description="What is lacking before it counts as implemented.")
    names: list[str] = Field(description="Public names that implement it.")
    usage: str
    bibtex: str
    claims: list[ClaimItem]
    evidence: dict[str, Any] | None = Field(description="Where the shipped runs come from.")
    cost: dict[str, Any] | None = Field(description="What a step costs.")
    floor: float | None = Field(description="Times plain training that a step takes at least, by what the method does.")
    official: dict[str, Any] | None = Field(description="The authors' code: repository, commit, licence.")
    exceptions: list[dict[str, Any]] = Field(
        description="Checks of the contract that it does not pass, with the reason."
    )
    guide: str = Field(description="How to use it, and when not, as HTML.")
    related: list[str] = Field(description="Slugs of related papers.")


class PaperList(BaseModel):
    """A page of a list."""

    total: int
    page: int
    per_page: int
    next: str | None = Field(description="Address of the next page.")
    by_meaning: bool = Field(description="Whether a sentence encoder had a say in the order.")
    papers: list[PaperItem]


class FamilyItem(BaseModel):
    """A problem family."""

    name: str
    words: str
    papers: int


class ChangeItem(BaseModel):
    """A verdict that became another one."""

    slug: str
    title: str
    claim: str
    statement: str
    old: str = Field(description="As it was called then: the words of the rule have changed once.")
    new: str
    at: datetime.datetime


class CommentItem(BaseModel):
    """What somebody has said of a paper."""

    id: int
    answers: int | None = Field(description="The comment below which it stands as an answer; null for one by itself.")
    author: str
    moderator: bool = Field(description="Whether the author is a moderator.")
    at: datetime.datetime
    url: str = Field(description="Its place on the paper's page.")
    text: str = Field(description="Markdown, as it was typed; empty where it is hidden.")
    html: str = Field(description="The same, rendered and sanitised.")
    hidden_because: str | None = Field(description="Why a moderator has hidden it; null for one that is shown.")


class CommentList(BaseModel):
    """A page of the comments on a paper, oldest first, each with its answers behind it."""

    page: int
    pages: int
    next: str | None = Field(description="Address of the next page.")
    comments: list[CommentItem]


class Plot(BaseModel):
    """A plot, as SVG that follows the style of the page that it stands in."""

    kind: Literal["effect", "curve"] = Field(description="effect: a claim's, by seed; curve: a metric's over training.")
    name: str = Field(description="Of the claim, or of the metric.")
    svg: str


class Board(BaseModel):
    """The best proven techniques of a problem."""

    family: str
    words: str
    papers: list[PaperItem]


class DayItem(BaseModel):
    """What became known on a day."""

    date: datetime.date
    verdicts: list[ChangeItem]
    papers: list[PaperItem] = Field(description="Papers that came in.")
    more: int = Field(description="How many more came in.")


class Import(BaseModel):
    """The last time that the Daily Papers were asked for."""

    at: datetime.datetime
    what: str
    seen: int
    added: int
    error: str = Field(description="Why it failed; empty where it worked.")
    worked_at: datetime.datetime | None = Field(description="When it last worked.")


class Changes(BaseModel):
    """What became known when, the latest day first."""

    days: list[DayItem]
    last_import: Import | None


class Totals(BaseModel):
    """How much there is, and what filters can ask for."""

    papers: int
    implemented: int
    claims: Verdicts
    years: list[int]
    tags: list[str] = Field(description="The most frequent tags.")
