"""Golden vectors of jose-melo/t-jepa at 98dda99 against the public API."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.self_supervised.t_jepa import (
    TJEPA,
    MaskSizes,
    TabularTransformer,
    TargetPredictor,
    average_momentum,
    cosine_value,
    encoder_positions,
    predictor_positions,
    warmup_cosine,
)

Outputs = dict[str, NDArray[np.float64]]
State = dict[str, Tensor]

# Official names of the parts of a stack to ours; the prototype of the layers, which is never used, has none.
_STACK = {
    "self_attn.in_proj_weight": "attention_in.weight",
    "self_attn.in_proj_bias": "attention_in.bias",
    "self_attn.out_proj": "attention_out",
    "linear1": "hidden",
    "linear2": "out",
}
_BEHIND = {"layernorm1": "norm1", "layernorm2": "norm2", "fc": "linear"}
_PREDICTOR = {
    "predictor_emb": "embed",
    "mask_token": "mask_token",
    "predictor_norm": "norm",
    "predictor_proj": "project",
}


def tolerance(case: Case, output: str) -> float:
    """The sheet's: 1e-12 for schedules, exact counts, else 1e-9, and 1e-6 for positions, which are float32 there."""
    if output in ("lr", "wd", "momentum"):
        return 1e-12
    if output == "n_ctx_n_tgt":
        return 0.0
    return 1e-6 if output.endswith("_pe") else 1e-9


def compute(case: Case) -> Outputs:
    """Outputs of a case, by the kind that its keys show.

    Raises:
        UnknownCase: the keys fit neither a step, nor schedules, positions or counts.
    """
    if case.has("in/x", "in/mask_ctx", "in/mask_tgt", "hp/num_heads"):
        return _step(case)
    if case.has("hp/iters_per_epoch", "hp/epochs"):
        return _schedules(case)
    if case.has("hp/n", "hp/dim"):
        return _positions(case)
    if case.has("hp/min_ctx", "hp/max_ctx", "hp/min_tgt", "hp/max_tgt", "hp/num_features"):
        return _counts(case)
    raise UnknownCase(case)


# -- a step --------------------------------------------------------------------------------------


def _step(case: Case) -> Outputs:
    states = {role: _given(case, f"{role}/") for role in ("ctx", "tgt", "pred")}
    cardinalities = {int(column): int(size) for column, size in case.hp.get("cardinalities", np.zeros((0, 2)))}
    columns = case.inputs["x"].shape[1]
    activation = case.text("activation", "relu")
    encoder = TabularTransformer(
        [column for column in range(columns) if column not in cardinalities],
        cardinalities,
        dim=states["ctx"]["tokenizer.weight"].shape[1],
        depth=_depth(states["ctx"], "encoder."),
        heads=int(case.number("num_heads")),
        feedforward=_feedforward(states["ctx"], "encoder."),
        reg_tokens=int(case.number("n_reg", 1)),
        activation=activation,
    ).double()
    width = states["pred"]["predictor_emb.weight"].shape[0]
    predictor = TargetPredictor(
        encoder.reg_tokens + columns,
        encoder.dim,
        dim=width,
        depth=_depth(states["pred"], "transformer."),
        heads=int(case.number("pred_num_heads", case.number("num_heads"))),
        feedforward=_feedforward(states["pred"], "transformer."),
        activation=activation,
    ).double()
    for net, role, rename in ((encoder, "ctx", _encoder_state), (predictor, "pred", _predictor_state)):
        net.load_state_dict({**net.state_dict(), **rename(states[role])})
    # Positions are part of the official predictor's state, in float32.
    table = states["pred"].get("predictor_pos_embed")
    if table is not None:
        predictor.positions[: table.shape[1]] = table[0]
    _set_eps(case.number("layer_norm_eps", 1e-5), encoder, predictor)
    momentum = case.number("ema_m", 0.996)
    jepa = TJEPA(
        encoder,
        predictor,
        total_steps=1,
        sizes=MaskSizes(columns, 1, 1, 1, 1),
        momentum=(momentum, 1.0),
        clip=None,
        reg_mode="official",
    )
    jepa.target.module.load_state_dict({**jepa.target.module.state_dict(), **_encoder_state(states["tgt"])})
    x, context, targets = (torch.tensor(case.inputs[name]) for name in ("x", "mask_ctx", "mask_tgt"))
    context = context[0] if context.ndim == 3 else context
    targets = targets[None] if targets.ndim == 2 else targets
    full, wanted = jepa.target(x), jepa.wanted(x, targets)
    seen = encoder(x, context)
    predicted = predictor(seen, context, targets)
    loss = jepa.loss(x, context, targets)
    loss.backward()
    outputs = {
        "target_full": full,
        "target_gathered": wanted.flatten(0, 1),
        "ctx_out": seen,
        "pred": predicted.flatten(0, 1),
        "loss": loss,
        **_under("grad", _official_gradients(encoder, predictor, states)),
    }
    jepa.after_step()
    averaged = dict(jepa.target.module.named_parameters())
    outputs |= _under("ema", {name: _find(averaged, name, encoder) for name in states["tgt"] if _is_weight(name)})
    return {name: value.detach().numpy() for name, value in outputs.items()}


def _given(case: Case, prefix: str) -> State:
    return {
        name.removeprefix(prefix): torch.tensor(value) for name, value in case.inputs.items() if name.startswith(prefix)
    }


def _is_weight(name: str) -> bool:
    return "transformer_layers." not in name and not name.endswith("pe.pe") and name != "predictor_pos_embed"


def _ours(name: str, stack: str) -> str | None:
    """Our name of a parameter of an official stack, None for its unused prototype."""
    rest = name.removeprefix(stack)
    if rest.startswith("transformer_layers."):
        return None
    if match := re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)", rest):
        part = match[2]
        for official, own in _STACK.items():
            part = part.replace(official, own)
        return f"stack.layers.{match[1]}.{part}"
    head, _, tail = rest.partition(".")
    return f"stack.{_BEHIND[head]}.{tail}" if head in _BEHIND else None


def _encoder_state(official: Mapping[str, Tensor]) -> State:
    state, tables = {}, {}
    for name, value in official.items():
        if match := re.fullmatch(r"tokenizer\.category_embeddings\.(\d+)\.weight", name):
            tables[int(match[1])] = value
        elif name in ("tokenizer.weight", "tokenizer.bias"):
            state[name] = value
        elif (own := _ours(name, "encoder.")) is not None:
            state[own] = value
    if tables:
        state["tokenizer.embedding"] = torch.cat([tables[number] for number in sorted(tables)])
    return state


def _predictor_state(official: Mapping[str, Tensor]) -> State:
    state = {}
    for name, value in official.items():
        head, _, tail = name.partition(".")
        if head in _PREDICTOR:
            state[f"{_PREDICTOR[head]}.{tail}".rstrip(".")] = value.flatten() if head == "mask_token" else value
        elif (own := _ours(name, "transformer.")) is not None:
            state[own] = value
    return state


def _find(tensors: Mapping[str, Tensor], official: str, encoder: TabularTransformer) -> Tensor:
    """Our tensor of an official name of the encoder; a table of one column is a part of ours."""
    if match := re.fullmatch(r"tokenizer\.category_embeddings\.(\d+)\.weight", official):
        sizes = list(encoder.tokenizer.cardinalities.values())
        start = sum(sizes[: int(match[1])])
        return tensors["tokenizer.embedding"][start : start + sizes[int(match[1])]]
    own = official if official.startswith("tokenizer.") else _ours(official, "encoder.")
    assert own is not None
    return tensors[own]


def _official_gradients(encoder: TabularTransformer, predictor: TargetPredictor, states: Mapping[str, State]) -> State:
    grads = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    found = {name: _find(grads, name, encoder) for name in states["ctx"] if _is_weight(name)}
    own = {name: p.grad for name, p in predictor.named_parameters() if p.grad is not None}
    for name, value in states["pred"].items():
        renamed = _predictor_state({name: value})
        if renamed and next(iter(renamed)) in own:
            found[name] = own[next(iter(renamed))].view(value.shape)
    return found


def _under(group: str, tensors: Mapping[str, Tensor]) -> State:
    return {f"{group}/{name}": value for name, value in tensors.items()}


def _depth(state: Mapping[str, Tensor], stack: str) -> int:
    pattern = re.compile(re.escape(stack) + r"transformer\.layers\.(\d+)\.")
    return 1 + max(int(match[1]) for name in state if (match := pattern.match(name)))


def _feedforward(state: Mapping[str, Tensor], stack: str) -> int:
    return len(state[f"{stack}transformer.layers.0.linear1.weight"])


def _set_eps(eps: float, *nets: TabularTransformer | TargetPredictor) -> None:
    for net in nets:
        net.stack.norm1.eps = eps
        net.stack.norm2.eps = eps


# -- schedules, positions, counts ----------------------------------------------------------------


def _schedules(case: Case) -> Outputs:
    iterations, scale = case.number("iters_per_epoch"), case.number("ipe_scale", 1.0)
    length = iterations * case.number("epochs") * scale
    total = int(length)
    warmup = int(case.number("warmup_epochs", 0) * iterations)
    after = range(1, len(case.outputs.get("lr", np.zeros(total))) + 1)
    # Behind its end the official cosine rises again; ours stays, so there it is read backwards.
    steps = [total - abs(i - total) for i in after]
    rate = {"start": case.number("start_lr", 0.0), "peak": case.number("ref_lr"), "final": case.number("final_lr", 0.0)}
    decay = {"start": case.number("wd", 0.0), "final": case.number("final_wd", 0.0)}
    ends = {"start": case.number("ema_start", 0.996), "final": case.number("ema_end", 1.0)}
    return {
        "lr": np.array([warmup_cosine(i, warmup=warmup, total=total, **rate) for i in steps]),
        "wd": np.array([cosine_value(i, total=total, **decay) for i in steps]),
        "momentum": np.array([average_momentum(i, total=length, **ends) for i in range(total + 1)]),
    }


def _positions(case: Case) -> Outputs:
    number, width = int(case.number("n")), int(case.number("dim"))
    return {
        "encoder_pe": encoder_positions(number + int(case.number("n_reg", 1)), width).double().numpy(),
        "predictor_pe": predictor_positions(number, width).double().numpy(),
    }


def _counts(case: Case) -> Outputs:
    shares = {name: case.number(name) for name in ("min_ctx", "max_ctx", "min_tgt", "max_tgt")}
    sizes = MaskSizes.of_shares(
        int(case.number("num_features")),
        (shares["min_ctx"], shares["max_ctx"]),
        (shares["min_tgt"], shares["max_tgt"]),
    )
    iterations = int(case.number("iterations", len(case.outputs.get("n_ctx_n_tgt", np.zeros(30)))))
    drawn = [sizes.draw(torch.Generator().manual_seed(iteration)) for iteration in range(iterations)]
    return {"n_ctx_n_tgt": np.array(drawn, dtype=np.float64)}
