"""The whole method: warm-up and target, answers and advantages, direction of the weight, state, and other models."""

from functools import partial

import pytest
import torch
from torch import nn

from regularized.alignment.amft import AMFT, PPO, Critic, MetaWeightController, Rollouts, ScheduledWeight, sample
from regularized.alignment.amft.loss import log_probs_and_entropy, until_end
from regularized.alignment.amft.rollouts import advantages_of, completion_logits, evaluating, mean_entropy
from regularized.evidence.language_models import small_lm
from regularized.training.data import TensorData

TOKENS, MARK, END = 6, 4, 5


def policy(seed=0):
    """A decoder of 6 tokens."""
    return small_lm(seed, TOKENS, width=16, layers=1, heads=2)


def copies(number=64, *, wrong=0.0, seed=0):
    """Prompts of a token and a mark, answered by that token and the end; a share by the next token instead.

    Without the mark the answer would repeat the prompt, and rotary attention sees no difference in equal tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    asked = torch.randint(MARK, (number, 1), generator=generator)
    bad = torch.rand(number, 1, generator=generator) < wrong
    answers = torch.cat([torch.where(bad, (asked + 1) % MARK, asked), torch.full_like(asked, END)], dim=1)
    return torch.cat([asked, torch.full_like(asked, MARK)], dim=1), answers


def same(prompts, answers):
    """The whole answer must be right: a reward that does not pay for the end works against demonstrations of it."""
    return ((prompts[:, 0] == answers[:, 0]) & (answers[:, 1] == END)).float()


def build(model=None, **options):
    settings = {
        "reward": same,
        "optimizer": partial(torch.optim.Adam, lr=0.01),
        "end": END,
        "length": 2,
        "warmup": 3,
        "rollouts": 4,
        "controller": MetaWeightController(every=2, entropy_lr=0.01),
    }
    return AMFT(policy() if model is None else model, **settings | options)


def fit(training, *, epochs=2, wrong=0.0, **options):
    data = TensorData(*copies(wrong=wrong), batch_size=16, seed=1)
    return training.fit(data, validation=copies(20, seed=1), epochs=epochs, **options)


# -- answers ------------------------------------------------------------------------------------


def test_sampling_follows_the_policy():
    """Fails when tokens are drawn from other positions' logits, at another temperature, or after the end."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    model = nn.Embedding.from_pretrained(logits)
    prompts = torch.zeros(20_000, 1, dtype=torch.int64)
    torch.manual_seed(0)
    drawn = sample(model, prompts, length=3, end=2).completions
    first = torch.bincount(drawn[:, 0], minlength=3) / len(drawn)
    torch.testing.assert_close(first, logits[0].softmax(0), atol=0.02, rtol=0)
    behind = drawn[drawn[:, 0] == 1, 1]
    torch.testing.assert_close(
        torch.bincount(behind, minlength=3) / len(behind), logits[1].softmax(0), atol=0.03, rtol=0
    )
    assert (drawn[~until_end(drawn, 2)] == 2).all()
    assert sample(model, prompts[:1], length=3, end=2, greedy=True).completions.tolist() == [[2, 2, 2]]


def test_logits_are_those_that_tokens_are_drawn_from():
    """Fails when completions are scored one position off: their log-probabilities against those of the sampler."""
    model, prompts = policy(), copies()[0].repeat(1, 2)
    drawn = sample(model, prompts, length=4, end=END).completions
    steps = [model(torch.cat([prompts, drawn[:, :t]], dim=1))[:, -1].log_softmax(-1) for t in range(4)]
    wanted = torch.stack(steps, dim=1).gather(-1, drawn[..., None])[..., 0]
    torch.testing.assert_close(log_probs_and_entropy(completion_logits(model, prompts, drawn), drawn)[0], wanted)


def test_advantages_without_a_critic():
    """Fails when answers to different prompts are compared, or a long answer's tokens differ among themselves."""
    rewards = torch.tensor([1.0, 0.0, 3.0, 3.0])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]])
    found = advantages_of(rewards, mask, None, per_prompt=2)
    assert found.returns is None
    assert found.advantages[2, 0] == found.advantages[2, 1] == found.advantages[3, 0]
    assert found.advantages[0, 0] == found.advantages[0, 1] > 0 > found.advantages[1, 0]
    assert (found.advantages[mask == 0] == 0).all()


def test_the_reward_stands_at_the_end():
    """Fails when the reward is paid at the first token or behind the end, so that returns of earlier tokens are 0."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = advantages_of(torch.tensor([2.0, 5.0]), mask, torch.zeros(2, 4), per_prompt=1, gae_lambda=1.0, gamma=0.5)
    assert found.returns.tolist() == [[0.5, 1.0, 2.0, 0.0], [5.0, 0.0, 0.0, 0.0]]


# -- the step -----------------------------------------------------------------------------------


def test_warm_up_then_target_then_mixture():
    """Fails when rewards move the warm-up, H* is of another model than that at its end, or mu moves before it."""
    entropies = []

    def watch(training):
        if training.steps == 3:
            assert training.last is None
            with evaluating(training.policy):
                data = TensorData(*copies(), batch_size=16, seed=1)
                entropies.append(mean_entropy(training.policy, data.batches(0), end=END).item())

    training = build()
    records = fit(training, after_step=watch)
    assert training.controller.target_entropy == pytest.approx(entropies[0])
    assert training.controller.steps == training.steps - 3 == 5
    assert training.looks == 3  # of mixed steps 0, 2 and 4
    assert set(records[0]) == {"imitation", "reward_loss", "reward", "entropy", "mu", "by_meta", "by_entropy"}
    plain = build(controller=ScheduledWeight(1.0), warmup=0)
    fit(plain, epochs=1)
    warm = build(warmup=4)
    records = fit(warm, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.policy.parameters(), warm.policy.parameters()))
    assert records[0]["mu"] != records[0]["mu"]  # NaN: there was no mixed step


def test_imitation_alone_draws_no_answers():
    """Fails when answers are drawn, and paid for, that have no weight."""

    def never(model, prompts):
        raise AssertionError("an answer was drawn")

    fit(build(controller=ScheduledWeight(1.0), sampler=never))
    fit(build(controller=MetaWeightController(bounds=(1.0, 1.0), entropy_lr=0.1), sampler=never))


def test_ratios_of_another_policy():
    """Fails when log-probabilities that a sampler brings are thrown away: the loss is that of their ratios."""
    rewards = torch.arange(64.0) % 2  # two of four answers to each prompt, whatever they are
    drawn = []

    def sampler(model, prompts):
        found = sample(model, prompts, length=2, end=END, per_prompt=4)
        now, _ = log_probs_and_entropy(completion_logits(model, *found[:2]), found.completions)
        drawn.append(found.completions)
        return Rollouts(*found[:2], now - 0.1 * rewards[:, None])

    training = build(
        controller=ScheduledWeight(0.0),
        warmup=0,
        sampler=sampler,
        ppo=PPO(entropy_bonus=0.0),
        reward=lambda prompts, answers: rewards,
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )
    records = fit(training, epochs=1)
    wanted = []
    for completions in drawn:
        mask = until_end(completions, END)
        advantages = advantages_of(rewards, mask, None, per_prompt=4).advantages
        wanted.append(-((0.1 * rewards[:, None]).exp() * advantages)[mask].mean())
    assert len(wanted) == 4
    assert records[0]["reward_loss"] == pytest.approx(sum(wanted).item() / 4, abs=1e-5)
    assert abs(records[0]["reward_loss"]) > 0.01


def test_critic_learns_and_leaves_the_policy_alone():
    """Fails when the value loss trains the policy, or the critic looks at the wrong positions and cannot learn."""
    trained = {}
    for value_weight in (0.1, 50.0):
        critic = Critic(16)
        training = build(
            critic=critic,
            critic_optimizer=partial(torch.optim.SGD, lr=0.0),
            ppo=PPO(value_weight=value_weight),
            controller=ScheduledWeight(0.3),
        )
        fit(training)
        trained[value_weight] = [p.detach().clone() for p in training.policy.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*trained.values()))
    # A frozen policy that is right for some prompts and wrong for others: values must tell them apart.
    critic = Critic(16)
    training = build(
        optimizer=partial(torch.optim.SGD, lr=0.0),
        critic=critic,
        critic_optimizer=partial(torch.optim.Adam, lr=0.05),
        controller=ScheduledWeight(0.0),
        reward=lambda prompts, answers: (prompts[:, 0] < 2).float(),
        ppo=PPO(value_weight=1.0),
        warmup=0,
    )
    fit(training, epochs=20)
    hidden = {}
    training.policy.norm.register_forward_hook(lambda _m, _i, out: hidden.update(last=out))
    training.policy(torch.tensor([[token, MARK] for token in range(MARK)]))
    values = critic(hidden["last"])[:, -1]
    assert values[:2].min() > 0.6
    assert values[2:].max() < 0.4


@pytest.mark.parametrize(
    ("wrong", "reward", "rises"), [(0.6, same, False), (0.0, lambda p, a: torch.rand(len(a)), True)]
)
def test_direction_of_the_weight(wrong, reward, rises):
    """Fails for the sign of the authors' code: mu falls when demonstrations are wrong, rises when rewards are noise."""
    controller = MetaWeightController(entropy_lr=0.0, every=1, meta_lr=0.02)
    training = build(controller=controller, reward=reward, rollouts=8, warmup=40)  # behind it L_SFT has nearly ended
    fit(training, epochs=20, wrong=wrong)
    assert (controller.mu.item() > 0.5) == rises


def test_a_utility_of_ones_own():
    """Fails when a function of the policy is not asked for, or in training mode."""
    seen = []

    def loss(model):
        seen.append(model.training)
        return model(copies(8)[0]).square().mean()

    training = build()
    training.fit(TensorData(*copies(), batch_size=16), validation=loss, epochs=2)
    assert seen == [False] * 3
    assert training.policy.training


def test_learns():
    """Fails when the mixture does not reach the weights: copying is learned although half of the examples are wrong."""
    training = build(controller=ScheduledWeight(0.2), rollouts=8, warmup=16)
    records = fit(training, epochs=16, wrong=0.5)
    assert training.score(copies()[0]) > 0.9
    assert records[-1]["reward"] > records[4]["reward"] + 0.2


# -- state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 5])
def test_resume_within_an_epoch(stop, tmp_path):
    """Fails when mu, H*, the look at held-out data, the critic or the draws are not saved: in warm-up and behind it."""

    def make():
        return build(critic=Critic(16), controller=MetaWeightController(every=2, entropy_lr=0.01))

    class Enough(Exception):
        pass

    def leave(training):
        if training.steps == stop:
            torch.save(training.state_dict(), tmp_path / "state.pt")
            raise Enough

    whole = make()
    fit(whole, epochs=3)
    half = make()
    with pytest.raises(Enough):
        fit(half, epochs=3, after_step=leave)
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    fit(again, epochs=3)
    assert again.controller.mu.item() == whole.controller.mu.item() != 0.5
    assert again.looks == whole.looks
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(value, again.policy.state_dict()[name])
    assert torch.equal(whole.critic.head.weight, again.critic.head.weight)


def test_a_model_of_hugging_face():
    """Fails when a model whose output has `logits` is not understood, or its hidden states are not found."""
    transformers = pytest.importorskip(
        "transformers", reason="needs transformers: pip install regularized[huggingface]"
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=TOKENS, num_key_value_heads=2, use_cache=False, **shape)
    training = build(transformers.LlamaForCausalLM(config), critic=Critic(16, features="model.norm"))
    records = fit(training)
    assert 0.0 < records[-1]["mu"] < 1.0
    assert 0.0 <= training.score(copies()[0]) <= 1.0
