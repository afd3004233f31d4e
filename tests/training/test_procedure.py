"""Optimizers, epochs and checked state of procedures.

Each test names the bug that makes it fail; all of them were tried. The last part builds small procedures of the kinds
that the catalogue has, to see that the parts serve them: two networks, a generator with its critic, tasks, rounds.
"""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from regularized.training.data import TensorData, as_source
from regularized.training.finite import NonFiniteLoss
from regularized.training.optimizers import Optimizers
from regularized.training.procedure import Epochs, Part
from regularized.training.progress import Progress, piecewise
from regularized.training.randomness import mix, rng_state
from regularized.training.state import restore, state_of

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
START = Progress(0, 4)


class Noise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, seed):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x):
        return x + 0.1 * torch.randn(x.shape, generator=self.generator)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2), Noise(seed))


def data(size=4, n=14):
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.randn(n, 3, generator=generator), torch.arange(n) % 2, batch_size=size, seed=1)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


class Pair:
    """Two networks that train one after the other, each with its own pass; noise from a generator of their own."""

    def __init__(self, seed=0, *, draws=5, optimizer=SGD, schedule=None):
        self.networks = (network(seed), network(seed + 1))
        schedule = piecewise({0.5: 0.1}) if schedule is None else schedule
        self.optimizers = Optimizers([optimizer(net.parameters()) for net in self.networks], schedule=schedule)
        self.epochs = Epochs(draws)
        self.noise = torch.Generator().manual_seed(3)

    def training_step(self, net, batch, *, progress):
        x = batch.inputs + 0.1 * torch.randn(batch.inputs.shape, generator=self.noise)
        loss = nn.functional.cross_entropy(self.networks[net](x), batch.targets)
        self.optimizers.minimise(loss, net, progress=progress)
        return loss.detach()

    def fit(self, data, *, epochs, after_step=None):
        parts = [Part(as_source(data, seed=7), partial(self.training_step, net), stream=(net,)) for net in range(2)]
        means = self.epochs.run(parts, until=epochs, after_step=after_step)
        return [[float(first), float(second)] for first, second in means]

    def state_dict(self):
        return state_of(self, "networks", "optimizers", "epochs", "noise")

    def load_state_dict(self, state):
        restore(self, state, "networks", "optimizers", "epochs", "noise")


class Stop(Exception):
    pass


def stopping(after):
    """Stops behind so many steps."""
    left = [after]

    def stop():
        left[0] -= 1
        if not left[0]:
            raise Stop

    return stop


# -- steps --------------------------------------------------------------------------------------


def test_rates_do_not_compound():
    """Fails when the factor multiplies the present rate instead of the first, or is not taken up after a load."""
    pair = Pair(schedule=lambda progress: 0.5)
    pair.fit(data(), epochs=3)
    assert [group["lr"] for optimizer in pair.optimizers for group in optimizer.param_groups] == [0.05, 0.05]
    again = Pair(schedule=lambda progress: 0.5)
    again.load_state_dict(pair.state_dict())
    again.fit(data(), epochs=4)
    assert [group["lr"] for optimizer in again.optimizers for group in optimizer.param_groups] == [0.05, 0.05]


def test_one_schedule_or_one_for_each():
    """Fails when the schedules are mixed up, or a group that was added later has no rate of its own."""
    nets = network(0), network(1)
    optimizers = Optimizers([SGD(nets[0].parameters()), SGD(nets[1].parameters(), lr=1.0)], schedule=(0.1, 0.2))
    late = nn.Parameter(torch.ones(2))
    optimizers[1].add_param_group({"params": [late], "lr": 4.0})
    loss = sum(net(torch.randn(5, 3)).sum() for net in nets) + late.sum()
    optimizers.minimise(loss, progress=START)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    assert rates == [[pytest.approx(0.01)], [pytest.approx(0.2), pytest.approx(0.8)]]
    assert optimizers.steps == [1, 1]


def test_a_rate_that_is_a_tensor_is_written_in_place():
    """Fails when a capturable optimizer's tensor is replaced by a number, which a captured graph would not see."""
    weight = nn.Parameter(torch.ones(2))
    rate = torch.tensor(0.5)
    optimizers = Optimizers([torch.optim.Adam([weight], lr=rate)], schedule=0.5)
    for _ in range(2):
        optimizers.minimise(weight.sum(), progress=START)
    assert optimizers[0].param_groups[0]["lr"] is rate
    assert float(rate) == 0.25


def test_only_the_optimizers_asked_for_step():
    """Fails when a step on one loss moves, or clears the gradients of, a network that is not to step."""
    nets = network(0), network(1)
    optimizers = Optimizers([SGD(net.parameters()) for net in nets])
    before = copy.deepcopy(nets[1].state_dict())
    x = torch.randn(5, 3)
    optimizers.minimise(nets[1](nets[0](x) @ torch.ones(2, 3)).sum(), 0, progress=START)
    assert all(torch.equal(p, before[name]) for name, p in nets[1].named_parameters())
    kept = nets[1][0].weight.grad.clone()
    optimizers.minimise(nets[0](x).sum(), 0, progress=START)
    assert torch.equal(nets[1][0].weight.grad, kept)
    assert optimizers.steps == [2, 0]


def root(parameter):
    """Zero, with a gradient that is NaN."""
    return (parameter * 0).square().sum().sqrt()


@pytest.mark.parametrize(
    ("loss", "schedule", "words"),
    [
        (lambda one, two: one.sum() + two.sum() + root(two), 1.0, "a gradient of the critic is not finite in epoch 2"),
        (lambda one, two: one.sum() + root(two) + math.inf, 1.0, "the loss of the maker and the critic is not finite"),
        (lambda one, two: (one + two).sum(), (1.0, lambda p: math.nan), "its schedule gave the critic is not finite"),
    ],
)
def test_nothing_that_is_not_finite_reaches_a_weight(loss, schedule, words):
    """Fails when gradients, losses or rates are not looked at, or only after the first optimizer has stepped."""
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizers = Optimizers([SGD([one]), SGD([two])], schedule=schedule, names=("the maker", "the critic"))
    with pytest.raises(NonFiniteLoss, match=words):
        optimizers.minimise(loss(one, two), progress=Progress(5, 9, epoch=2))
    assert torch.equal(one, torch.ones(2))
    assert torch.equal(two, torch.ones(2))
    assert optimizers.steps == [0, 0]


def test_where_looking_is_deferred_it_is_not_forgotten():
    """Fails when on an accelerator the flags of a step are never read: by the next step, settle, or before saving."""
    for read in ("minimise", "settle", "state_dict"):
        weight = nn.Parameter(torch.ones(2))
        optimizers = Optimizers([SGD([weight])])
        optimizers._deferred = True  # as on an accelerator
        optimizers.minimise(root(weight), progress=START)
        call = partial(optimizers.minimise, weight.sum(), progress=START)
        with pytest.raises(NonFiniteLoss, match="a gradient of network 0 is not finite in epoch 0, optimizer step 0"):
            {"minimise": call, "settle": optimizers.settle, "state_dict": optimizers.state_dict}[read]()


def test_poisoned_weights_are_not_saved():
    """Fails when a state is made of weights that overflowed although every gradient was finite."""
    weight = nn.Parameter(torch.ones(2))
    optimizers = Optimizers([torch.optim.SGD([weight], lr=1e38)])
    optimizers.minimise((weight * -9).sum(), progress=START)
    with pytest.raises(NonFiniteLoss, match="weights of network 0 are not finite"):
        optimizers.state_dict()


def test_weights_in_shards_are_refused(in_shards):
    """Fails when a procedure would step on shards: it looks at the gradients of one process alone."""
    own = [SGD(network().parameters()), SGD(in_shards(nn.Linear(2, 2)).parameters())]
    with pytest.raises(ValueError, match=r"weights of critic are in shards.*fully_shard"):
        Optimizers(own, names=["net", "critic"])


# -- epochs -------------------------------------------------------------------------------------


class Drawing(Dataset):
    """Samples that draw from the global generator when they are fetched."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        return torch.randn(3) + index / 10, index % 2


class Random(Sampler):
    """An order that depends on how often it was asked for, as one that follows the losses would."""

    def __init__(self):
        self.calls = 0

    def __iter__(self):
        self.calls += 1
        return iter(torch.randperm(14, generator=torch.Generator().manual_seed(self.calls)).tolist())

    def __len__(self):
        return 14


def loader(**options):
    return DataLoader(Drawing(), batch_size=4, **options)


SOURCES = {
    "tensors": data,
    "loader that draws": lambda: loader(shuffle=True),
    "own sampler": lambda: loader(sampler=Random()),
    "list": lambda: [(batch.inputs, batch.targets) for batch in data().batches(0)],
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8, 11])
def test_resume_is_exact_at_every_position(source, stop, tmp_path):
    """Fails when a batch is repeated or skipped, or dropout, data, sampler, momentum, rates or sums start anew.

    Four batches a pass, two passes an epoch: the stops lie in, between and behind passes.
    """
    whole = Pair()
    expected = whole.fit(SOURCES[source](), epochs=3)
    first, saved = Pair(), stopping(stop)

    def save_and_stop():
        torch.save(first.state_dict(), tmp_path / "state.pt")
        saved()

    kept = SOURCES[source]()
    with pytest.raises(Stop):
        first.fit(kept, epochs=3, after_step=save_and_stop)
    torch.manual_seed(99)
    second = Pair(seed=8)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    means = second.fit(kept, epochs=3)
    assert means == expected[-len(means) :]
    assert equal(second.state_dict(), whole.state_dict())


def test_stopped_between_steps_the_same_object_goes_on():
    """Fails when a call that ended in the middle of an epoch leaves position or random state behind."""
    whole, stopped = Pair(), Pair()
    expected = whole.fit(data(), epochs=2)
    for after in (3, 1, 5):
        with pytest.raises(Stop):
            stopped.fit(data(), epochs=2, after_step=stopping(after))
        torch.manual_seed(after)
    assert stopped.fit(data(), epochs=2) == expected[1:]
    assert equal(stopped.state_dict(), whole.state_dict())


class Interrupted(Pair):
    """Is interrupted in the middle of its second step."""

    def training_step(self, net, batch, *, progress):
        if self.optimizers.steps == [1, 0] and not hasattr(self, "again"):
            self.again = True
            raise KeyboardInterrupt
        return super().training_step(net, batch, progress=progress)


def test_a_step_left_half_way_is_not_passed_over():
    """Fails when a state of half a step is given out, or training goes on from it without a word."""
    pair = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        pair.fit(data(), epochs=1)
    with pytest.raises(RuntimeError, match="left half-way"):
        pair.state_dict()
    with pytest.warns(UserWarning, match="made once more"):
        pair.fit(data(), epochs=1)
    pair.state_dict()
    mended = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        mended.fit(data(), epochs=1)
    mended.load_state_dict(Pair().state_dict())  # of before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended.fit(data(), epochs=1)
    whole = Pair()
    whole.fit(data(), epochs=1)
    assert equal(mended.state_dict(), whole.state_dict())


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_the_global_generators_are_left_alone(ends):
    """Fails when what an epoch draws is felt outside, above all after an error."""
    torch.manual_seed(4)
    before = rng_state()
    if ends == "well":
        Epochs(0).run([], until=1)
        pair = Pair()
        torch.manual_seed(4)
        pair.fit(data(), epochs=1)
    else:
        pair = Pair()
        torch.manual_seed(4)
        with pytest.raises(Stop):
            pair.fit(data(), epochs=1, after_step=stopping(2))
    assert equal(rng_state(), before)


def test_progress_counts_over_all_epochs():
    """Fails when the position in a pass, the epoch or the total that schedules see is wrong."""
    seen = []

    def step(batch, *, progress):
        seen.append((progress.step, progress.total_steps, progress.epoch, progress.total_epochs))
        return torch.zeros(())

    epochs = Epochs(0)
    part = Part(data(size=7), step)
    for until in (1, 2):
        for _ in epochs.run([part], until=until):
            assert epochs.done == until
    assert seen == [(0, 2, 0, 1), (1, 2, 0, 1), (2, 4, 1, 2), (3, 4, 1, 2)]


def test_means_and_draws_of_the_parts():
    """Fails when a mean is not that of its own pass, or two passes of an epoch draw the same, or see one order."""
    drawn, asked = {0: [], 1: []}, []

    class Asked(TensorData):
        def batches(self, epoch, **position):
            asked.append(epoch)
            return super().batches(epoch, **position)

    def step(number, batch, *, progress):
        drawn[number].append(float(torch.rand(())))
        return batch.targets.double().mean() + 10 * number

    epochs = Epochs(0)
    source = Asked(torch.zeros(14, 3), torch.arange(14) % 2, batch_size=7, shuffle=False)
    parts = [Part(source, partial(step, number), stream=(number,)) for number in range(2)]
    means = [[float(mean) for mean in each] for each in epochs.run(parts, until=2)]
    assert means == [[0.5, 10.5]] * 2
    assert asked == [0, 1, 2, 3], "each pass is to see an order of its own"
    assert len({*drawn[0], *drawn[1]}) == 8


def test_data_that_end_early():
    """Fails when a pass that was too short counts as done, or cannot be completed."""

    class Short(list):
        def __len__(self):
            return 3

    batches = [(batch.inputs, batch.targets) for batch in data().batches(0)][:2]
    pair, short = Pair(), Short(batches)
    with pytest.raises(ValueError, match="ended after 2 of 3 batches"):
        pair.fit(short, epochs=1)
    with pytest.raises(ValueError, match="epoch of other data: kind is Short there"):
        pair.fit([*batches, batches[0]], epochs=1)


# -- state --------------------------------------------------------------------------------------


def stopped_state():
    pair = Pair()
    with pytest.raises(Stop):
        pair.fit(data(), epochs=2, after_step=stopping(5))
    return pair.state_dict()


def without(state, *path):
    """The state, less one entry at a path."""
    changed = dict(state)
    if len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = without(state[path[0]], *path[1:])
    return changed


def with_buffer():
    pair = Pair()
    pair.networks[1].register_buffer("more", torch.zeros(1))
    return pair


def wider():
    pair = Pair()
    pair.networks[1][3] = nn.Linear(4, 5)
    return pair


def drawing():
    pair = Pair()
    pair.networks[0][2].generator = torch.Generator()
    return pair


@pytest.mark.parametrize(
    ("build", "change", "words"),
    [
        (Pair, lambda s: without(s, "networks"), r"the state of Pair does not fit: missing \['networks'\]"),
        (Pair, lambda s: s | {"gradients": 1}, r"unknown \['gradients'\]"),
        (Pair, lambda s: without(s, "epochs", "batch"), r"epochs does not fit: missing \['batch'\]"),
        (Pair, lambda s: without(s, "optimizers", "steps"), r"optimizers does not fit: missing \['steps'\]"),
        (Pair, lambda s: s | {"networks": s["networks"][:1]}, r"networks does not fit: missing \['1'\]"),
        (with_buffer, lambda s: s, r"networks\[1\] does not fit: missing \['more'\]"),
        (wider, lambda s: s, r"networks\[1\] does not fit: '3.weight' has shape \(2, 4\) in the state and \(5, 4\)"),
        (drawing, lambda s: s, r"Pair has \['networks.0.2.generator', 'networks.0.4.gen"),
        (partial(Pair, draws=6), lambda s: s, "made with seed=5, this training has seed=6"),
        (
            partial(Pair, optimizer=partial(SGD, momentum=0.5)),
            lambda s: s,
            r"optimizers\[0\] was built otherwise: momentum is 0.9 there and 0.5 here",
        ),
        (partial(Pair, optimizer=partial(SGD, lr=0.2)), lambda s: s, "initial_lr is 0.1 there and 0.2 here"),
        (partial(Pair, optimizer=torch.optim.Adam), lambda s: s, "class is SGD there and Adam here"),
    ],
)
def test_the_state_of_another_training_changes_nothing(build, change, words):
    """Fails when a key, a tensor, a generator or a setting that differs is not seen, or seen when half is loaded."""
    state, pair = change(stopped_state()), build()
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(ValueError, match=words):
        pair.load_state_dict(state)
    assert equal(pair.state_dict(), before)


def test_settings_that_an_optimizer_changes_itself_do_not_stand_in_the_way():
    """Fails when hyperparameters are compared as they are now: some optimizers keep estimates among them."""

    class Adapting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["momentum"] *= 0.9

    pair = Pair(optimizer=partial(Adapting, lr=0.1, momentum=0.9))
    pair.fit(data(), epochs=1)
    again = Pair(optimizer=partial(Adapting, lr=0.1, momentum=0.9))
    again.load_state_dict(pair.state_dict())
    assert again.optimizers[0].param_groups[0]["momentum"] == pair.optimizers[0].param_groups[0]["momentum"] != 0.9


def test_other_data_in_the_middle_of_an_epoch():
    """Fails when a position is taken for one in other data; where an epoch ends others may follow."""
    pair = Pair()
    pair.load_state_dict(stopped_state())
    with pytest.raises(ValueError, match="other data: batch_size is 4 there and 2 here; batches is 4 there and 7 here"):
        pair.fit(data(size=2), epochs=2)
    others = data()
    others.targets[3] = 1 - others.targets[3]
    with pytest.raises(ValueError, match="other data: the content differs"):
        pair.fit(others, epochs=2)
    fresh = Pair()
    fresh.fit(data(), epochs=1)
    fresh.fit(data(size=2), epochs=2)


def test_what_cannot_be_saved():
    """Fails when an object without a state is left out silently."""
    pair = Pair()
    pair.helper = [pair.networks[0], object()]
    with pytest.raises(TypeError, match=r"helper\[1\] is a object"):
        state_of(pair, "networks", "helper")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizers": []}, "at least one optimizer"),
        ({"schedule": (1.0, 1.0)}, "2 schedules"),
        ({"names": ()}, "0 names"),
    ],
)
def test_optimizers_that_do_not_match(settings, words):
    """Fails when a missing schedule or name is noticed at the first step only."""
    chosen = {"optimizers": [SGD(network().parameters())], **settings}
    with pytest.raises(ValueError, match=words):
        Optimizers(chosen.pop("optimizers"), **chosen)


# -- other kinds of procedures ------------------------------------------------------------------


class Adversaries:
    """A generator and its critic; the generator is also pushed away from reference weights, on its gradient."""

    def __init__(self, references=()):
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(2, 3), nn.Linear(3, 1)
        adam = partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.99))
        self.optimizers = Optimizers(
            [adam(self.generator.parameters()), adam(self.critic.parameters())], names=("the generator", "the critic")
        )
        self.references = list(references)  # plain tensors
        self.epochs = Epochs(0)

    def training_step(self, batch, *, progress):
        fake = self.generator(torch.randn(len(batch.inputs), 2))
        softplus = nn.functional.softplus
        critic_loss = (softplus(-self.critic(batch.inputs)) + softplus(self.critic(fake.detach()))).mean()
        self.optimizers.minimise(critic_loss, 1, progress=progress)
        loss = softplus(-self.critic(fake)).mean()
        self.optimizers[0].zero_grad()
        loss.backward()
        for parameter, reference in zip(self.generator.parameters(), self.references):
            parameter.grad -= 0.1 * (parameter.detach() - reference)
        self.optimizers.step(0, progress=progress, loss=loss)
        return torch.stack((loss.detach(), critic_loss.detach()))

    def fit(self, data, *, epochs, after_step=None):
        return list(self.epochs.run([Part(data, self.training_step)], until=epochs, after_step=after_step))

    names = ("generator", "critic", "optimizers", "references", "epochs")


class Tasks:
    """Tasks one after the other: a new optimizer for each, an anchor at its end, a head that is never shrunk."""

    names = ("task", "model", "anchor", "optimizers", "epochs")

    def __init__(self):
        self.model = network()
        self.anchor = {}
        self.begin(0)

    def begin(self, task):
        self.task = task
        self.optimizers = Optimizers([SGD(self.model.parameters())])
        self.epochs = Epochs(mix(5, task))

    def training_step(self, batch, *, progress):
        loss = nn.functional.cross_entropy(self.model(batch.inputs), batch.targets)
        for name, value in self.anchor.items():
            loss = loss + (self.model.get_parameter(name) - value).square().sum()
        self.optimizers.minimise(loss, progress=progress)
        return loss.detach()

    def fit(self, tasks, *, epochs, after_step=None):
        for task in range(self.task, len(tasks)):
            if task != self.task:
                self.begin(task)
            list(self.epochs.run([Part(tasks[task], self.training_step)], until=epochs, after_step=after_step))
            self.anchor = {name: p.detach().clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("stop", [2, 6])
def test_adversaries_resume_exactly(stop):
    """Fails when two steps on one batch, or a gradient changed before the step, do not fit into the parts."""
    whole, first, second = (Adversaries([torch.ones(3, 2)]) for _ in range(3))
    whole.fit(data(), epochs=2)
    with pytest.raises(Stop):
        first.fit(data(), epochs=2, after_step=stopping(stop))
    second.references = [torch.zeros(3, 2)]
    restore(second, copy.deepcopy(state_of(first, *first.names)), *second.names)
    second.fit(data(), epochs=2)
    assert equal(state_of(second, *second.names), state_of(whole, *whole.names))
    assert whole.optimizers.steps == [8, 8]
    plain = Adversaries()
    plain.fit(data(), epochs=2)
    assert not torch.equal(plain.generator.weight, whole.generator.weight)


@pytest.mark.parametrize("stop", [3, 9, 14])
def test_tasks_resume_exactly(stop):
    """Fails when the number of a task, its anchor, or the optimizer that it began with are not restored."""
    tasks = [data(size=4), data(size=7)]
    whole, first, second = Tasks(), Tasks(), Tasks()
    whole.fit(tasks, epochs=3)
    counted = stopping(stop)
    with pytest.raises(Stop):
        first.fit(tasks, epochs=3, after_step=counted)
    state = copy.deepcopy(state_of(first, *first.names))
    second.begin(state["task"])
    restore(second, state, *second.names)
    second.fit(tasks, epochs=3)
    assert equal(state_of(second, *second.names), state_of(whole, *whole.names))
    assert second.task == 1


def test_a_teacher_that_is_not_there_yet():
    """Fails when the weights of a copy that a later stage makes are put where the copy is missing, or the reverse."""
    early, late = Pair(), Pair()
    early.teacher, late.teacher = None, network(2)
    for one, other, words in (
        (early, late, "None here and a OrderedDict"),
        (late, early, "a Sequential here and None"),
    ):
        with pytest.raises(ValueError, match=f"teacher is {words} in the state"):
            restore(one, state_of(other, "networks", "teacher"), "networks", "teacher")
    early.teacher = network(3)
    restore(early, state_of(late, "teacher"), "teacher")
    assert equal(early.teacher.state_dict(), late.teacher.state_dict())


def test_a_loaded_state_is_a_copy_of_its_own():
    """Fails when a table that was loaded changes with the one that it was saved from."""
    one, other = Adversaries([torch.ones(3, 2)]), Adversaries([torch.zeros(3, 2)])
    restore(other, state_of(one, *one.names), *one.names)
    one.references[0].fill_(7.0)
    assert torch.equal(other.references[0], torch.ones(3, 2))
