"""Tasks whose answers are checked: what is right, against an evaluation of each string with fractions."""

import ast
from fractions import Fraction

import pytest
import torch

from regularized.alignment.amft.points import PointsGame
from regularized.alignment.amft.puzzles import ALPHABET, END, Sums, decode, encode


def value(text):
    """An expression's value by Python's own parser, in fractions; None where it divides by zero or is none."""

    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = walk(node.left), walk(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right

    try:
        return walk(ast.parse(text, mode="eval").body)
    except ZeroDivisionError:
        return None


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def game():
    return PointsGame(cards=3, targets=(12, 24))


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1.0])
def test_points_are_judged_right(game, wrong):
    """Fails for signs of equal strength, a card twice or not at all, another hand's answer, or one without an end."""
    hands = game.hands.repeat(3, 1)
    prompts = game.prompts(hands, generator())
    shown = game.demonstrate(prompts, generator(1), wrong=wrong)
    rewards = game.reward(*shown)
    for hand, text, reward in zip(hands.tolist(), decode(shown.answers), rewards.tolist()):
        *cards, target = hand
        used = sorted(int(letter) for letter in text if letter.isdigit())
        assert used == cards
        assert (value(text) == target) == bool(reward), (hand, text)
    share = 1.0 - rewards.mean().item()
    assert share == pytest.approx(0.95 * wrong, abs=0.1)  # some that are drawn blindly are right
    assert wrong == 0.0 or game.reward(prompts, shown.answers.roll(1, dims=0)).mean() < 0.2


def test_points_lists_every_answer(game):
    """Fails when a form, an order or a sign is left out: all strings of three cards, tried one by one."""
    hand, target = (3, 3, 8), 24
    forms = ["{}{}{}{}{}", "({}{}{}){}{}", "{}{}({}{}{})"]
    prompts = game.prompts(torch.tensor([[*hand, target]]))
    texts = {
        form.format(a, s, b, t, c)
        for form in forms
        for a, b, c in {(3, 3, 8), (3, 8, 3), (8, 3, 3)}
        for s in "+-*/"
        for t in "+-*/"
    }
    rewards = game.reward(prompts.expand(len(texts), -1), encode([f"{text};" for text in texts], game.answer_length))
    assert {text for text, reward in zip(texts, rewards) if reward} == {t for t in texts if value(t) == target}


def test_points_refuses_what_is_no_answer(game):
    """Fails when brackets of one's own, another hand's answer, one without an end, or an empty one is paid for."""
    prompts = game.prompts(torch.tensor([[2, 4, 4, 24]]))
    right, *others = ["(2+4)*4;", "((2+4)*4);", "6*4;", "(2+4)*4", "", "(2+4)*4=;"]
    answers = encode([right, *(text or ";" for text in others)], 12)
    answers[3, 7:] = 0  # no end
    assert game.reward(prompts.expand(len(answers), -1), answers).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert game.reward(game.prompts(torch.tensor([[1, 1, 1, 24]])), encode([right])).tolist() == [0.0]


def test_four_cards():
    """Fails when the numbers that stand for an answer of four cards overflow, so that two of them are one."""
    game = PointsGame(cards=4)
    shown = game.demonstrate(game.prompts(game.hands, generator()), generator(1))
    assert len(game.hands) == 404
    for text in decode(shown.answers):
        assert value(text) == 24
    assert len(game._right.unique()) == len(game._answers)
    hand = torch.tensor([[3, 3, 8, 8, 24]])  # the famous one
    assert game.reward(game.prompts(hand), encode(["8/(3-8/3);"])).item() == 1.0


@pytest.mark.parametrize(("terms", "digits"), [(2, 2), (3, 1), (1, 1)])
def test_sums(terms, digits):
    """Fails for a zero in front, digits the wrong way round, or a right beginning that is paid for."""
    sums = Sums(terms, digits=digits)
    prompts = sums.prompts(60, generator())
    wanted = [sum(map(int, text[:-1].split("+"))) for text in decode(prompts)]
    assert sums.values(prompts).tolist() == wanted
    for change, paid in (("{};", 1.0), ("0{};", 0.0), ("{}0;", 0.0)):
        answers = encode([change.format(number) for number in wanted], sums.answer_length + 2)
        assert sums.reward(prompts, answers).tolist() == [paid] * 60
    unended = encode([str(number) for number in wanted], sums.answer_length + 1)
    unended[unended == END] = ALPHABET.index("+")
    assert sums.reward(prompts, unended).sum() == 0
    shown = sums.demonstrate(prompts, generator(), wrong=0.4)
    assert sums.reward(*shown).mean().item() == pytest.approx(0.6, abs=0.15)
