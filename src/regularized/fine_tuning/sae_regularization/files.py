"""Files of sparse autoencoders: our own (safetensors and JSON), and those of SAELens. Nothing is unpickled."""

from pathlib import Path

from regularized.fine_tuning.sae_regularization.autoencoder import TopKSAE
from regularized.mechanisms.sealed_files import load_sealed, read_settings, save_sealed

__all__ = ["load_sae", "load_sae_lens", "save_sae"]

_FORMAT = 2


def save_sae(sae: TopKSAE, folder: str | Path) -> None:
    """Write an autoencoder with its counters, as ``sae.safetensors`` and ``sae.json``.

    Args:
        sae: the autoencoder.
        folder: is made where it is not there.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save_sae(TopKSAE(8, 32, k=4), folder)
        >>> load_sae(folder)
        TopKSAE(num_inputs=8, num_features=32, k=4)
    """
    save_sealed(folder, "sae", sae.state_dict(), {"k": sae.k}, version=_FORMAT)


def load_sae(folder: str | Path) -> TopKSAE:
    """An autoencoder that :func:`save_sae` wrote, frozen, on the CPU.

    Args:
        folder: where the two files are.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are damaged, or were written by another version.
    """
    config, tensors = load_sealed(folder, "sae", version=_FORMAT)
    try:
        fired = tensors.pop("fired")
        sae = TopKSAE.from_tensors(**tensors, k=config["k"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"the files in {folder} are not those of an autoencoder: {error}") from error
    sae.fired = fired
    return sae


def load_sae_lens(folder: str | Path) -> TopKSAE:
    """An autoencoder in the files of SAELens: ``cfg.json`` and ``sae_weights.safetensors``; frozen, on the CPU.

    Architectures ``standard``, ``topk`` and ``jumprelu``. What SAELens does at run time is folded into the weights: an
    input from which ``b_dec`` is not subtracted, and activations scaled by the decoder's norm.

    Args:
        folder: where the two files are.

    Raises:
        ValueError: another architecture, embeddings that are normalised at run time, or a damaged file.
        FileNotFoundError: a file is missing.

    Examples:
        >>> import json, tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "cfg.json").write_text(json.dumps({"architecture": "topk", "k": 2}))
        >>> sae = TopKSAE(4, 16, k=2, tied=False)
        >>> weights = {"W_enc": sae.encoder.T.contiguous(), "W_dec": sae.decoder}
        >>> biases = {"b_enc": sae.encoder_bias, "b_dec": sae.decoder_bias}
        >>> save_file({**weights, **biases}, folder / "sae_weights.safetensors")
        >>> load_sae_lens(folder)
        TopKSAE(num_inputs=4, num_features=16, k=2, tied=False)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_settings(folder / "cfg.json")
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / 'sae_weights.safetensors'} is damaged: {error}; download it again") from error
    needed = ["W_enc", "W_dec", "b_dec", *(["threshold"] if config.get("architecture") == "jumprelu" else [])]
    if absent := [name for name in needed if name not in tensors]:
        raise ValueError(f"{folder}: the autoencoder has no {', '.join(absent)}; there are {sorted(tensors)[:8]}")
    kind = config.get("architecture", "standard")
    if kind not in ("standard", "topk", "jumprelu"):
        raise ValueError(
            f"{folder}: architecture {kind!r} is not one of standard, topk, jumprelu; give its effective weights to "
            "TopKSAE.from_tensors"
        )
    if config.get("normalize_activations") not in (None, "none"):
        raise ValueError(
            f"{folder}: the autoencoder normalises its input at run time ({config['normalize_activations']!r}); "
            "normalise the embeddings yourself, fold a constant factor into the weights, and use TopKSAE.from_tensors"
        )
    encoder, decoder, shift = tensors["W_enc"].T, tensors["W_dec"], tensors["b_dec"]
    bias = tensors.get("b_enc", encoder.new_zeros(len(encoder)))
    if not config.get("apply_b_dec_to_input", True):
        bias = bias + encoder @ shift  # ours subtracts b_dec first
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm[:, None]
    # Older files keep k beside the name of the activation function, and call the architecture "standard".
    arguments = config.get("activation_fn_kwargs") or config.get("activation_fn_kwargs_dict")
    k = config.get("k", arguments.get("k") if isinstance(arguments, dict) else None)
    top_k = kind == "topk" or config.get("activation_fn", config.get("activation_fn_str")) == "topk"
    if top_k and not isinstance(k, int):
        raise ValueError(
            f"{folder}: a topk autoencoder whose cfg.json has no k, or none that is a number: {k!r}; add it"
        )
    return TopKSAE.from_tensors(
        encoder,
        encoder_bias=bias,
        decoder=decoder,
        decoder_bias=shift,
        threshold=tensors["threshold"] if kind == "jumprelu" else None,
        k=k if top_k else None,
    )
