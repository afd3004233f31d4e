"""The game of points: make the target from the cards, each used once. With four cards and 24 it is the game of 24.

``3448>24=``, say, is answered by ``3*8*(4/4);``. Answers are expressions with ``+ - * /`` and brackets around parts of
two or three cards. All right ones are listed once, when the game is made; an answer is then looked up by a number that
stands for hand and text, so that a batch is judged without a loop.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement, permutations, product

import torch
from torch import Tensor

from regularized.alignment.amft.expressions import LETTERS, OPERATIONS, evaluate, forms, with_signs
from regularized.alignment.amft.loss import until_end
from regularized.alignment.amft.puzzles import ALPHABET, END, Demonstrations, powers
from regularized.mechanisms.ranges import allowed, between

__all__ = ["PointsGame"]


class PointsGame:
    """The game of points.

    Args:
        cards: 2 to 4; default 4, as in the game of 24.
        targets: what may be asked for, numbers of two digits; default 24.
        highest: the highest card, 9 at most; default 9.

    Attributes:
        hands: (N, cards + 1): cards in increasing order and a target, all for which there is a right answer.
        answer_length: T of the longest right answer, its end included.

    Raises:
        ValueError: a setting is outside its range, or no hand makes any of the targets.

    Examples:
        >>> from regularized.alignment.amft.puzzles import encode
        >>> game = PointsGame(cards=3)
        >>> prompts = game.prompts(torch.tensor([[2, 4, 4, 24]]))
        >>> game.reward(prompts.expand(4, -1), encode(["(2+4)*4;", "4*(4+2);", "2+4*4;", "4*6;"]))
        tensor([1., 1., 0., 0.])
        >>> shown = game.demonstrate(game.prompts(game.hands), torch.Generator().manual_seed(0))
        >>> bool(game.reward(*shown).all())
        True
    """

    @allowed(cards=between(2, 4, whole=True), highest=between(1, 9, whole=True))
    def __init__(self, cards: int = 4, *, targets: Sequence[int] = (24,), highest: int = 9) -> None:
        if not targets or not all(10 <= target <= 99 for target in targets):
            raise ValueError(f"targets must be numbers of two digits, at least one, got {list(targets)}")
        self.cards: int = cards
        self.targets: tuple[int, ...] = tuple(targets)
        self.highest: int = highest
        self._forms = forms(cards)
        self.answer_length: int = max(map(len, self._forms)) + 1
        hands, answers = self._solve()
        if not len(hands):
            raise ValueError(f"{cards} cards up to {highest} make none of {list(targets)}; take more cards, or others")
        keys = self._hand_keys(hands)
        order = keys.argsort(stable=True)
        self._answers = answers[order]  # all right answers, hand by hand
        self._hands, starts = torch.unique_consecutive(keys[order], return_counts=True)
        self._ends = starts.cumsum(0)
        self._starts = self._ends - starts
        self.hands: Tensor = hands[order][self._starts]
        self._right = self._keys(self._hand_keys(hands), answers)[0].sort().values

    def prompts(self, hands: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Prompts (N, L) of some hands, such as ``482>24=``.

        Args:
            hands: (N, cards + 1), as in :attr:`hands`.
            generator: puts the cards of each into an order of its own; default None, as they are.
        """
        cards, targets = hands[:, :-1], hands[:, -1:]
        if generator is not None:
            cards = _shuffled(cards, generator)
        colon, equals = (torch.full_like(targets, ALPHABET.index(sign)) for sign in ">=")
        return torch.cat([cards, colon, targets // 10, targets % 10, equals], dim=1)

    def reward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """(N,): 1 where the answer uses each card once, makes the target, and ends; else 0.

        Args:
            prompts: (N, L).
            answers: (N, T).
        """
        keys, complete = self._keys(self._hand_keys(self._hands_of(prompts)), answers)
        right = self._right.to(keys.device)
        found = right[torch.searchsorted(right, keys).clamp_max(len(right) - 1)] == keys
        return (found & complete).float()

    def demonstrate(self, prompts: Tensor, generator: torch.Generator, *, wrong: float = 0.0) -> Demonstrations:
        """A right answer to each prompt, drawn from all of them.

        Args:
            prompts: (N, L), of hands that have one.
            generator: draws them.
            wrong: share that is answered by an expression of the same cards that is drawn blindly, and not right;
                default 0. With 1 they show the notation, and nothing of the game.

        Raises:
            ValueError: a prompt has no right answer.
        """
        keys = self._hand_keys(self._hands_of(prompts))
        hand = torch.searchsorted(self._hands, keys).clamp_max(len(self._hands) - 1)
        if bool((self._hands[hand] != keys).any()):
            raise ValueError("there is a prompt without a right answer; take prompts of rows of `hands`")
        first, number = self._starts[hand], self._ends[hand] - self._starts[hand]
        drawn = (torch.rand(len(hand), generator=generator, dtype=torch.float64) * number).long()
        answers = self._answers[first + drawn]
        blind = self._blind(prompts[:, : self.cards], generator)
        bad = (torch.rand(len(hand), generator=generator) < wrong) & (self.reward(prompts, blind) == 0.0)
        return Demonstrations(prompts, torch.where(bad[:, None], blind, answers))

    # -- expressions ------------------------------------------------------------------------

    def _solve(self) -> tuple[Tensor, Tensor]:
        """Hands (M, cards + 1) and tokens (M, T) of all right answers, each once."""
        deals = torch.tensor(list(combinations_with_replacement(range(1, self.highest + 1), self.cards)))
        dealt = torch.cat([deals[:, list(order)] for order in permutations(range(self.cards))]).unique(dim=0)
        sorted_cards = dealt.sort(dim=1).values
        numbers = {letter: column.double() for letter, column in zip(LETTERS, dealt.T)}
        hands, answers = [], []
        for form, signs in product(self._forms, product(OPERATIONS, repeat=self.cards - 1)):
            expression = with_signs(form, signs)
            value = evaluate(expression, numbers)
            for target in self.targets:
                rows = ((value - target).abs() < 1e-9).nonzero()[:, 0]
                hands.append(torch.cat([sorted_cards[rows], torch.full((len(rows), 1), target)], dim=1))
                answers.append(self._spelled(expression, dealt[rows]))
        return torch.cat(hands), torch.cat(answers)

    def _spelled(self, expression: str, cards: Tensor) -> Tensor:
        letters = expression.ljust(self.answer_length, ALPHABET[END])
        columns = [
            cards[:, LETTERS.index(letter)]
            if letter in LETTERS
            else cards.new_full((len(cards),), ALPHABET.index(letter))
            for letter in letters
        ]
        return torch.stack(columns, dim=1)

    def _blind(self, cards: Tensor, generator: torch.Generator) -> Tensor:
        """(N, T) an expression of each row's cards, of any form and signs."""
        places = torch.arange(self.cards)[None, :]  # a, b, ... as 0, 1, ...
        spelled = torch.cat([self._spelled(form, places) for form in self._forms])
        form = spelled[torch.randint(len(spelled), (len(cards),), generator=generator)]
        signs = torch.randint(len(OPERATIONS), form.shape, generator=generator) + ALPHABET.index(OPERATIONS[0])
        card = _shuffled(cards, generator).gather(1, form.clamp_max(self.cards - 1))
        return torch.where(form < self.cards, card, torch.where(form == ALPHABET.index("+"), signs, form))

    # -- numbers that stand for hands and answers -------------------------------------------

    def _hands_of(self, prompts: Tensor) -> Tensor:
        cards, tens, ones = prompts[:, : self.cards], prompts[:, self.cards + 1], prompts[:, self.cards + 2]
        return torch.cat([cards.sort(dim=1).values, (10 * tens + ones)[:, None]], dim=1)

    def _hand_keys(self, hands: Tensor) -> Tensor:
        return (hands[:, :-1] * powers(10, self.cards, hands)).sum(dim=1) * 100 + hands[:, -1]

    def _keys(self, hand_keys: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """One number for each pair of a hand and an answer, and whether the pair has one: below 2^63 for four cards."""
        known = self._hands.to(hand_keys.device)
        hand = torch.searchsorted(known, hand_keys).clamp_max(len(known) - 1)
        longest = self.answer_length - 1
        inside = until_end(answers, END) & (answers != END)
        text = ((answers + 1) * inside)[:, :longest]
        complete = (known[hand] == hand_keys) & (inside.sum(dim=1) <= longest) & ~inside.all(dim=1)
        return (text * powers(len(ALPHABET), text.shape[1], answers)).sum(dim=1) * len(known) + hand, complete


def _shuffled(cards: Tensor, generator: torch.Generator) -> Tensor:
    return cards.gather(1, torch.rand(cards.shape, generator=generator).argsort(dim=1).to(cards.device))
