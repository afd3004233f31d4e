"""A real small model and its tokenizer: digits, the two prompts, a score, one step of LoRA."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from regularized.alignment.self_judge import RESPONSE, Answer, Judge, Vocabulary, view_of
from regularized.evidence.experiment import Unavailable
from regularized.evidence.pretrained import smollm2, smollm2_tokenizer

TWO = [
    Answer("good", "What is the capital of France?", "Paris.", "It is Paris.", 9),
    Answer("bad", "What is the capital of France?", "A banana.", "It is Paris.", 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return smollm2_tokenizer()
    except Unavailable as missing:
        pytest.skip(str(missing))  # not in CI, where conftest.py makes this a failure


@pytest.mark.slow
def test_digits_of_smollm2(tokenizer):
    """Fails when a grade behind the prompt is not the token that the model would write there."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    vocabulary = Vocabulary.of(encode, end=tokenizer.eos_token_id)
    for grade, token in enumerate(vocabulary.grades):
        assert tokenizer.decode([token]) == str(grade)
        assert encode(f"{RESPONSE}{grade}")[-1] == token


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="the adapter is PEFT's LoRA")
def test_a_step_of_smollm2(tokenizer):
    """Fails when the real model, wrapped by PEFT, is called in a way that it does not know, or learns nothing."""
    from peft import LoraConfig, get_peft_model

    encode = partial(tokenizer.encode, add_special_tokens=False)
    vocabulary = Vocabulary.of(encode, end=tokenizer.eos_token_id)
    seen, blind = (view_of(TWO, encode, with_reference=with_it) for with_it in (True, False))
    torch.manual_seed(0)
    model = get_peft_model(smollm2(torch.float32), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    judge = Judge(model, vocabulary, optimizer=partial(torch.optim.AdamW, lr=1e-3))
    before = judge.score(blind)
    assert bool(((before >= 0) & (before <= 9)).all())
    first, second = judge.fit(seen, blind, epochs=2, batch_size=2)
    assert second < first
