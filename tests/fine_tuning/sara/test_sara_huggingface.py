"""SaRA in transformers' own Trainer: what goes wrong there without a word, and resuming."""

import pytest
import torch
from torch import nn

from regularized.evidence.models import mlp, seeded
from regularized.fine_tuning.sara import SaRA
from regularized.training.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers", reason='needs the extra "huggingface"')

from regularized.fine_tuning.sara.huggingface import SaraCallback  # noqa: E402


class Classifier(nn.Module):
    """What transformers' Trainer can train."""

    def __init__(self):
        super().__init__()
        self.net = seeded(0, mlp, [8, 70, 70, 4])

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


DATA = [{"x": x, "labels": i % 4} for i, x in enumerate(torch.randn(48, 8, generator=torch.Generator().manual_seed(1)))]


def trainer(folder, *, steps=8, callback=True, give=True):
    """The trainer, its model, and SaRA; of eight steps, the second selection after four."""
    model = Classifier()
    sara = SaRA(model, fraction=0.2, total_steps=8)
    optimizer = sara.bind(torch.optim.AdamW(sara.parameters(), lr=1e-2))
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=6,
        per_device_train_batch_size=6,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    options = {"optimizers": (optimizer, None)} if give else {}
    callbacks = [SaraCallback(sara)] if callback else []
    made = transformers.Trainer(model, arguments, train_dataset=DATA, callbacks=callbacks, **options)
    made.pop_callback(transformers.PrinterCallback)
    return made, model, sara


def test_an_optimizer_of_the_models_parameters_is_refused(tmp_path):
    """Fails when transformers builds its own optimizer, trains for hours, and no weight has changed."""
    alone, _, sara = trainer(tmp_path, give=False, callback=False)
    with pytest.raises(RuntimeError, match=r"nothing would change.*sara.bind\(AdamW\("):
        alone.train()
    assert sara.steps == 0
    with pytest.raises(ValueError, match="does not hold SaRA's trained entries"):  # before the first step
        trainer(tmp_path, give=False)[0].train()


def test_the_same_in_a_loop_of_ones_own():
    """Fails when only transformers' mistake is seen; or the optimizer of another model is refused."""
    model, other = Classifier(), nn.Linear(3, 3)
    sara = SaRA(model, fraction=0.2, total_steps=8)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.zeros(2, 3)).sum().backward()
    elsewhere.step()
    wrong = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**{"x": torch.zeros(2, 8), "labels": torch.tensor([0, 1])})["loss"].backward()
    with pytest.raises(RuntimeError, match="nothing would change"):
        wrong.step()
    sara.finalize()
    wrong.step()  # a plain model again


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    """Fails when the selection, its second edition or the step count are lost between transformers' checkpoints."""
    whole, expected, _ = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "parts", steps=6)[0].train()
    again, model, sara = trainer(tmp_path / "parts")
    again.train(resume_from_checkpoint=True)
    assert sara.steps == 8
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_resuming_what_was_not_kept(tmp_path):
    """Fails when moments of another selection end in a size that does not match, without the way out."""
    trainer(tmp_path, steps=6, callback=False)[0].train()
    with pytest.raises(RuntimeError, match=r"callbacks=\[SaraCallback\(sara\)\]"):
        trainer(tmp_path, callback=False)[0].train(resume_from_checkpoint=True)
    with pytest.raises((CheckpointError, OSError)):
        trainer(tmp_path)[0].train(resume_from_checkpoint=True)
