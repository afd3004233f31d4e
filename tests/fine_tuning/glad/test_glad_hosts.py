"""GLAD where it is used: PEFT's LoRA on a two-tower model, our Trainer, and Hugging Face's."""

from functools import partial

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from regularized.fine_tuning.glad.classifier import FewShotClassifier
from regularized.fine_tuning.glad.huggingface import SteeredTraining
from regularized.fine_tuning.glad.loss import clip_logits
from regularized.fine_tuning.glad.optimizer import GLAD
from regularized.fine_tuning.glad.peft import add_lora
from regularized.training import Checkpoints, Compute, CrossEntropy, Logging, TensorData, Term, Trainer

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
TOWER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PROMPTS = torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(0))


def clip():
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TOWER | {"vocab_size": 20, "eos_token_id": 19},
        vision_config=TOWER | {"image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    return transformers.CLIPModel(config)


def tuned(dropout=0.0, **settings):
    model = clip()
    torch.manual_seed(1)
    return FewShotClassifier(add_lora(model, dropout=dropout, **settings), PROMPTS).train()


def images(n=12):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 3


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def vector(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def tune(classifier, steps=3, **settings):
    x, y = images()
    optimizer = GLAD(torch.optim.AdamW(trained(classifier), lr=0.02), **settings)

    def closure():
        loss = F.cross_entropy(classifier(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return classifier


# -- two towers with PEFT's LoRA -----------------------------------------------------------------


def test_adapters_go_into_both_towers_and_the_rest_is_frozen():
    """Fails when the pattern of the targets misses a tower, or takes the output projections too."""
    names = [name for name, p in tuned().named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 3 * 2  # towers, layers, projections, factors
    assert all("lora_" in name and any(f".{t}." in name for t in ("q_proj", "k_proj", "v_proj")) for name in names)
    for tower, other in (("vision", "text"), ("text", "vision")):
        names = [name for name, p in tuned(towers=tower).named_parameters() if p.requires_grad]
        assert len(names) == 12
        assert not any(f"{other}_model" in name for name in names)


def test_logits_are_those_of_the_model():
    """Fails when features are not normalised, or the scale is taken without its exponential."""
    model, (x, _) = clip().eval(), images()
    with torch.no_grad():
        image = model.get_image_features(pixel_values=x).pooler_output
        text = model.get_text_features(input_ids=PROMPTS).pooler_output
        expected = clip_logits(image, text, logit_scale=model.logit_scale.exp())
        model.logit_scale.requires_grad_(False)
        got = FewShotClassifier(model, PROMPTS)(x)
    torch.testing.assert_close(got, expected)


def test_first_step_uphill_moves_only_b():
    """At the start B = 0, so the gradient of A is 0 and the whole step lies in B. Fails with another start."""
    classifier, (x, y) = tuned(), images()
    before = {name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad}
    seen = []

    def closure():
        seen.append({name: p.detach().clone() for name, p in classifier.named_parameters() if p.requires_grad})
        loss = F.cross_entropy(classifier(x), y)
        loss.backward()
        return loss

    GLAD(SGD(trained(classifier)), rho=0.1).backward(closure)
    moved = {name: float((seen[1][name] - p).norm()) for name, p in before.items()}
    assert all((length > 0) == ("lora_B" in name) for name, length in moved.items())
    assert sum(length**2 for length in moved.values()) ** 0.5 == pytest.approx(0.1, rel=1e-4)


def test_saved_loaded_and_merged_by_stock_peft(tmp_path):
    """Fails when the adapter is of a form that PEFT alone cannot read, or the base model is changed."""
    x, _ = images()
    start = tuned().eval()(x).detach()
    classifier = tune(tuned(dropout=0.2)).eval()
    out = classifier(x).detach()
    assert float((out - start).abs().max()) > 1e-2  # it changes something at all
    classifier.model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(clip(), tmp_path).eval()
    torch.testing.assert_close(FewShotClassifier(loaded, PROMPTS)(x), out, rtol=0, atol=1e-6)
    with loaded.disable_adapter():
        torch.testing.assert_close(FewShotClassifier(loaded, PROMPTS)(x), start, rtol=0, atol=1e-6)
    merged = loaded.merge_and_unload()
    assert type(merged) is transformers.CLIPModel
    assert set(merged.state_dict()) == set(clip().state_dict())
    merged.requires_grad_(False)
    torch.testing.assert_close(FewShotClassifier(merged, PROMPTS)(x), out, rtol=0, atol=1e-5)


def test_missing_extra_is_named(monkeypatch):
    """Fails when a missing PEFT gives a bare ModuleNotFoundError."""
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"regularized\[peft\]"):
        add_lora(clip())


def test_labels_give_what_hugging_face_takes():
    """Fails when the loss is not the mean over the images, or the descriptions enter the checkpoint."""
    classifier, (x, y) = tuned(), images()
    out = classifier(pixel_values=x, labels=y)
    torch.testing.assert_close(out["loss"], F.cross_entropy(classifier(x), y))
    assert "input_ids" not in classifier.state_dict()


# -- our Trainer ----------------------------------------------------------------------------------


def fit(batch=6, *, accumulate=1, epochs=3, data=None, terms=None, model=None, build=GLAD, **settings):
    given = {name: settings.pop(name) for name in ("rho", "lam", "combine") if name in settings}
    model = tuned(dropout=0.2 if settings.pop("drop", False) else 0.0) if model is None else model
    x, y = images()
    data = TensorData(x, y, batch_size=batch, seed=4) if data is None else data
    trainer = Trainer(
        model,
        terms=terms or {"task": CrossEntropy()},
        optimizer=lambda groups: build(SGD(groups), **given),
        accumulate=accumulate,
        logging=Logging(every=0),
        **{"compute": Compute(device="cpu"), **settings},
    )
    return trainer, partial(trainer.fit, data, epochs=epochs)


def test_trainer_equals_the_plain_loop():
    """Fails when the trainer passes once, clips the first gradient, or divides the second pass otherwise."""
    trainer, go = fit(12, rho=0.3, clip_norm=0.7)
    go()
    classifier, (x, y) = tuned(), images()
    optimizer = GLAD(SGD(trained(classifier)), rho=0.3)

    def closure():
        loss = F.cross_entropy(classifier(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.backward(closure)
        nn.utils.clip_grad_norm_(trained(classifier), 0.7)
        optimizer.step()
    torch.testing.assert_close(vector(trained(trainer.model)), vector(trained(classifier)), rtol=0, atol=1e-6)


def test_trainer_accumulates():
    """Fails when each micro-batch has a step uphill of its own."""
    ends = []
    for batch, accumulate in ((12, 1), (6, 2), (5, 3)):
        trainer, go = fit(batch, accumulate=accumulate, rho=0.5)
        go()
        ends.append(vector(trained(trainer.model)))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ends[2], ends[0], rtol=0, atol=1e-5)


def test_trainer_off_is_the_base_optimizer():
    """Fails when `rho = 0` still costs a pass, or changes a bit."""
    ends = []
    for build in (partial(GLAD, rho=0.0), lambda base: base):
        trainer, go = fit(build=build, drop=True)
        go()
        ends.append(vector(trained(trainer.model)))
    assert torch.equal(*ends)


def test_trainer_resumes_exactly(tmp_path):
    """Fails when the count of steps, the random state after a second pass, or the settings are not saved."""
    build = partial(GLAD, rho=0.3, every=2, combine="steer")
    whole, go = fit(4, drop=True, build=build)
    go()
    settings = {"checkpoints": Checkpoints(tmp_path, every=1), "drop": True}
    _, go = fit(4, build=build, **settings)
    go(max_steps=4)
    resumed, go = fit(4, build=partial(GLAD, rho=0.3, every=2), **settings)
    go(resume=True)
    assert torch.equal(vector(trained(whole.model)), vector(trained(resumed.model)))


def test_trainer_in_bf16():
    """Fails when the second pass leaves the autocast, or a list operation does not take its types."""
    exact, go = fit(rho=0.1)
    go()
    low, go = fit(rho=0.1, compute=Compute(device="cpu", precision="bf16"))
    go()
    difference = vector(trained(low.model)) - vector(trained(exact.model))
    assert bool(difference.isfinite().all())
    assert float(difference.abs().max()) < 0.05


class Remembering(Term):
    """Adds up what it has seen in training; its loss depends on it."""

    def __init__(self):
        super().__init__(weight=0.5)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, step):
        if self.training:
            self.seen += step.log_probabilities.detach().sum(dim=0)
        return (step.log_probabilities * self.seen).sum()


def test_terms_remember_each_batch_once():
    """Fails when the second pass is remembered, or logged: history and values must be those at the weights."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    data = TensorData(x, torch.arange(12) % 3, batch_size=12)

    def run(build):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        terms = {"task": CrossEntropy(), "history": Remembering()}
        trainer, go = fit(data=data, terms=terms, model=model, epochs=1, build=build)
        go()
        return trainer.objective, model.weight.detach()

    (one, moved), (two, plain) = run(partial(GLAD, rho=2.0)), run(lambda base: base)
    assert not torch.equal(moved, plain)
    for a, b in zip(one.buffers(), two.buffers(), strict=True):
        assert torch.equal(a, b)
    assert dict(one.values()) == dict(two.values())
    assert one.training
    assert one.terms["history"].training


# -- Hugging Face's Trainer -----------------------------------------------------------------------


class SteeredTrainer(SteeredTraining, transformers.Trainer):
    pass


def hugging(folder, batch, accumulate, *, optimizer=None, drop=0.0, resume=None, **settings):
    classifier = tuned(dropout=drop)
    x, y = images()
    rows = [{"pixel_values": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=3,
        lr_scheduler_type="linear",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no", **settings},
    )
    optimizer = optimizer or GLAD(SGD(trained(classifier)), rho=0.3, combine="interpolate", every=2)
    trainer = SteeredTrainer(classifier, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=resume)
    return classifier, trainer


def test_hugging_face_equals_the_plain_loop(tmp_path):
    """Fails when its trainer steps along the first gradient, or the schedule does not reach the base optimizer."""
    got, trainer = hugging(tmp_path, 12, 1, max_grad_norm=0.7)
    classifier, (x, y) = tuned(), images()
    optimizer = GLAD(SGD(trained(classifier)), rho=0.3, every=2)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * (3 - step) / 3

        def closure():
            loss = F.cross_entropy(classifier(x), y)
            loss.backward()
            return loss

        optimizer.backward(closure)
        nn.utils.clip_grad_norm_(trained(classifier), 0.7)
        optimizer.step()
    torch.testing.assert_close(vector(trained(got)), vector(trained(classifier)), rtol=0, atol=1e-5)
    assert trainer.state.global_step == 3


def test_hugging_face_accumulates(tmp_path):
    """Fails when each micro-batch is steered by itself, or the losses are divided otherwise."""
    whole, one = hugging(tmp_path, 12, 1)
    parts, many = hugging(tmp_path, 4, 3)
    torch.testing.assert_close(vector(trained(parts)), vector(trained(whole)), rtol=0, atol=1e-5)
    losses = [trainer.state.log_history[-1]["train_loss"] for trainer in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_hugging_face_resumes(tmp_path):
    """Fails when the optimizer's checkpoint lacks the settings or the count, or cannot be read without pickle."""
    settings = {"save_strategy": "steps", "save_steps": 1, "drop": 0.2}
    whole, _ = hugging(tmp_path, 4, 1, **settings)
    resumed, _ = hugging(tmp_path, 4, 1, resume=str(tmp_path / "checkpoint-5"), **settings)
    assert torch.equal(vector(trained(whole)), vector(trained(resumed)))


def test_hugging_face_with_another_optimizer_says_so(tmp_path):
    """Fails when plain training is passed off as GLAD."""
    with pytest.raises(TypeError, match=r"needs a GLAD optimizer, got AdamW; .*optimizers=\(GLAD"):
        hugging(tmp_path, 12, 1, optimizer=torch.optim.AdamW(trained(tuned())))


# -- Lightning --------------------------------------------------------------------------------------


def test_lightning_passes_its_closure(tmp_path):
    """Fails when automatic optimisation does not end where the plain loop does."""
    lightning = pytest.importorskip("pytorch_lightning")
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3

    def optimizer_of(model):
        return GLAD(SGD(model.parameters()), rho=0.5)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch, number):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer_of(self.model)

    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=12)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(module, data)
    model = build()
    optimizer = optimizer_of(model)

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.testing.assert_close(vector(module.model.parameters()), vector(model.parameters()))
